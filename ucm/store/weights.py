"""Who the weights are: a digest of a model folder or LoRA adapter, wherever it is mounted.

Reading all of a large model would take minutes at every start. This reads what tells two models
apart: names and sizes of the weight files, the safetensors headers (names, types, shapes of all
tensors), and a sample of the bytes of their tensors, spread over all of them. Training changes
nearly every tensor nearly everywhere, so two fine-tunes of one base differ in thousands of the
sampled bytes; a copy that was edited in one place by hand may not. `epoch` in the settings is for
those.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ucm.errors import UnsupportedEngine
from ucm.store.canonical import canonical_json

# The first family that a folder has any file of is what the engine loads.
_FAMILIES: Final = ((".safetensors",), (".bin", ".pt", ".pth"), (".gguf",))
# What training leaves beside the weights.
_NOT_WEIGHTS: Final = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")

_SAMPLE_BYTES: Final = 4096
_MAX_SAMPLES: Final = 2048
# The ends of other formats are dense: GGUF has its header at the start, a torch file has a
# checksum of each tensor at the end.
_END_BYTES: Final = 64 << 10
_HEADER_MAX_BYTES: Final = 256 << 20
_READ_THREADS: Final = 16

# Fields of adapter_config.json that say where an adapter came from, not what it does.
_ADAPTER_PROVENANCE: Final = frozenset(
    {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "task_type"}
)


@dataclass(frozen=True)
class _Span:
    """Bytes [start, start + length) of a file."""

    path: Path
    start: int
    length: int


def weights_identity(model_dir: Path) -> str:
    """The identity of the weights in `model_dir` (a folder, or one file), independent of its path.

    Raises UnsupportedEngine when there is nothing to read.
    """
    try:
        files = _weight_files(model_dir)
        if not files:
            raise UnsupportedEngine(
                f"{model_dir} has no weight files (*.safetensors, *.bin, *.pt, *.gguf) to know the"
                " model by: set model_id, to the same text on all instances that serve it"
            )
        digest = hashlib.sha256(b"ucm-weights-1\n")
        folder = model_dir if model_dir.is_dir() else model_dir.parent
        digest.update(canonical_json(_weight_format(folder)) + b"\n")
        _digest_files(digest, files)
    except OSError as error:
        raise UnsupportedEngine(
            f"the weights in {model_dir} can't be read ({error.strerror or error}: "
            f"{error.filename}): set model_id, to the same text on all instances that serve them"
        ) from error
    return f"sha256:{digest.hexdigest()}"


def lora_digest(adapter_dir: Path) -> bytes:
    """The identity of a LoRA adapter: its weights, and the config that says how they apply."""
    try:
        files = _weight_files(adapter_dir)
        if not files:
            raise UnsupportedEngine(f"the LoRA adapter {adapter_dir} has no weight files")
        config = _json_file(adapter_dir / "adapter_config.json")
        digest = hashlib.sha256(b"ucm-lora-1\n")
        applied = {key: config[key] for key in config if key not in _ADAPTER_PROVENANCE}
        digest.update(canonical_json(applied) + b"\n")
        _digest_files(digest, files)
    except OSError as error:
        raise UnsupportedEngine(
            f"the LoRA adapter {adapter_dir} can't be read ({error.strerror or error})"
        ) from error
    return digest.digest()


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        return []
    files = sorted(file for file in path.iterdir() if file.is_file())
    for suffixes in _FAMILIES:
        family = [
            file
            for file in files
            if file.suffix in suffixes and not file.name.startswith(_NOT_WEIGHTS)
        ]
        if family:
            return family
    return []


def _weight_format(folder: Path) -> dict[str, Any]:
    """How the bytes are to be read where they are quantised: two formats may share file names,
    sizes and even bytes."""
    return {
        "quantization_config": _json_file(folder / "config.json").get("quantization_config"),
        "hf_quant_config": _json_file(folder / "hf_quant_config.json"),
    }


def _json_file(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes(), parse_constant=str)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UnsupportedEngine(f"{path} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {"": value}


def _digest_files(digest: hashlib._Hash, files: Sequence[Path]) -> None:
    candidates: list[_Span] = []
    for file in files:
        size = file.stat().st_size
        header = _safetensors_header(file, size)
        digest.update(canonical_json([file.name, size, len(header)]) + b"\n" + header)
        candidates += (
            _tensor_spans(file, size, header) if header else _plain_spans(file, size, len(files))
        )
    # Spread over all of them: every n-th, whatever file they are in.
    step = max(1, -(-len(candidates) // _MAX_SAMPLES))
    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="ucm-weights") as threads:
        for data in threads.map(_read, candidates[::step]):
            digest.update(struct.pack("<Q", len(data)) + data)


def _read(span: _Span) -> bytes:
    with open(span.path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), span.length, span.start)


def _safetensors_header(file: Path, size: int) -> bytes:
    """The JSON header, or nothing where the file is no safetensors file."""
    if file.suffix != ".safetensors" or size < 8:
        return b""
    (length,) = struct.unpack("<Q", _read(_Span(file, 0, 8)))
    if not 0 < length <= min(size - 8, _HEADER_MAX_BYTES):
        return b""
    return _read(_Span(file, 8, length))


def _tensor_spans(file: Path, size: int, header: bytes) -> list[_Span]:
    """One sample of each tensor, at a place that its name decides: not always its first rows."""
    data_start = 8 + len(header)
    try:
        offsets = sorted(
            (name, *map(int, tensor["data_offsets"]))
            for name, tensor in json.loads(header).items()
            if name != "__metadata__"
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return _plain_spans(file, size, 1)
    spans: list[_Span] = []
    for name, start, end in offsets:
        room = max(0, end - start - _SAMPLE_BYTES)
        choice = int.from_bytes(
            hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "little"
        )
        first = data_start + start + choice % (room + 1)
        spans.append(_Span(file, first, min(_SAMPLE_BYTES, end - start)))
    return spans


def _plain_spans(file: Path, size: int, num_files: int) -> list[_Span]:
    return list(_spread(file, size, count=max(16, _MAX_SAMPLES // (2 * num_files))))


def _spread(file: Path, size: int, *, count: int) -> Iterator[_Span]:
    """Both ends, and `count` samples between them."""
    yield _Span(file, 0, min(size, _END_BYTES))
    yield _Span(file, max(0, size - _END_BYTES), min(size, _END_BYTES))
    room = max(0, size - _SAMPLE_BYTES)
    for index in range(count):
        yield _Span(file, room * index // count, min(size, _SAMPLE_BYTES))
