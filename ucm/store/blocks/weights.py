"""Who the weights are: a digest of a model folder or LoRA adapter, wherever it is mounted.

Reading all of a large model would take minutes at every start. This reads what tells two models
apart: of safetensors files the names, types and shapes of all tensors, in whatever files they are;
of other files names and sizes; and a sample of the bytes, spread over all of them. Training changes
nearly every tensor nearly everywhere, so two fine-tunes of one base differ in thousands of the
sampled bytes; a copy that was edited in one place by hand may not. `epoch` in the settings is for
those.

What counts are the files that vLLM would load from the folder, by its own rules; what else lies
beside them does not.
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
from ucm.store.blocks.canonical_json import canonical_json

# The first family that a folder has any file of is what the engine loads.
_FAMILIES: Final = ((".safetensors",), (".bin", ".pt", ".pth"), (".gguf",))
# One file of all weights in Mistral's own format; vLLM prefers it where it may choose.
_CONSOLIDATED: Final = "consolidated"
_CHOOSING_FORMATS: Final = ("auto", "mistral")
# What training leaves beside the weights.
_NOT_WEIGHTS: Final = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")

_SAMPLE_BYTES: Final = 4096
_MAX_SAMPLES: Final = 2048
# The ends of other formats are dense: GGUF has its header at the start, a torch file has a
# checksum of each tensor at the end.
_END_BYTES: Final = 64 << 10
_HEADER_MAX_BYTES: Final = 256 << 20
_READ_THREADS: Final = 16

_ADAPTER_CONFIG: Final = "adapter_config.json"
# Fields of adapter_config.json that say where an adapter came from, not what it does.
_ADAPTER_PROVENANCE: Final = frozenset(
    {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "task_type"}
)


@dataclass(frozen=True)
class _FilePart:
    """Bytes [start, start + length) of a file."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a safetensors file, whose bytes are `span`."""

    name: str
    dtype: str
    shape: list[int]
    span: _FilePart

    def sample(self) -> _FilePart:
        """At a place that its name decides: not always its first rows."""
        room = max(0, self.span.length - _SAMPLE_BYTES)
        choice = hashlib.sha256(self.name.encode("utf-8", "surrogatepass")).digest()[:8]
        start = self.span.start + int.from_bytes(choice, "little") % (room + 1)
        return _FilePart(self.span.path, start, min(_SAMPLE_BYTES, self.span.length))


def weights_identity(model_dir: Path, *, load_format: str = "auto") -> str:
    """The identity of the weights in `model_dir` (a folder, or one file), independent of its path
    and of how they are divided into files. `load_format` is vLLM's.

    Raises UnsupportedEngine when there is nothing to read.
    """
    try:
        files = _weight_files(model_dir, load_format)
        if not files:
            raise UnsupportedEngine(
                f"{model_dir} has no weight files (*.safetensors, *.bin, *.pt, *.gguf) to know the"
                " model by: set model_id, to the same text on all instances that serve it"
            )
        digest = hashlib.sha256(b"ucm-weights-2\n")
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
        files = adapter_files(adapter_dir)
        config = _json_file(adapter_dir / _ADAPTER_CONFIG)
        digest = hashlib.sha256(b"ucm-lora-2\n")
        applied = {key: config[key] for key in config if key not in _ADAPTER_PROVENANCE}
        digest.update(canonical_json(applied) + b"\n")
        _digest_files(digest, [file for file in files if file.name != _ADAPTER_CONFIG])
    except OSError as error:
        raise UnsupportedEngine(
            f"the LoRA adapter {adapter_dir} can't be read ({error.strerror or error})"
        ) from error
    return digest.digest()


def adapter_files(adapter_dir: Path) -> list[Path]:
    """All that `lora_digest` reads. Raises UnsupportedEngine where there are no weights."""
    weights = _weight_files(adapter_dir, "hf")
    if not weights:
        raise UnsupportedEngine(f"the LoRA adapter {adapter_dir} has no weight files")
    config = adapter_dir / _ADAPTER_CONFIG
    return [*weights, config] if config.is_file() else weights


def _weight_files(path: Path, load_format: str) -> list[Path]:
    """Those that vLLM loads. What begins with a dot is no file of the model: macOS leaves such
    things on shares."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        return []
    files = sorted(
        file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")
    )
    for suffixes in _FAMILIES:
        family = [
            file
            for file in files
            if file.suffix in suffixes and not file.name.startswith(_NOT_WEIGHTS)
        ]
        if family:
            return _loaded(family, load_format) if suffixes == (".safetensors",) else family
    return []


def _loaded(files: list[Path], load_format: str) -> list[Path]:
    """Of several safetensors files those that an index names, where there is one."""
    consolidated = [file for file in files if file.name.startswith(_CONSOLIDATED)]
    chosen, index = files, "model.safetensors.index.json"
    if consolidated and load_format in _CHOOSING_FORMATS:
        chosen, index = consolidated, "consolidated.safetensors.index.json"
    weight_map = _json_file(files[0].parent / index).get("weight_map")
    if not isinstance(weight_map, dict):
        return chosen
    named = {str(name) for name in weight_map.values()}
    return [file for file in chosen if file.name in named] or chosen


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
    tensors: list[_Tensor] = []
    plain: list[_FilePart] = []
    for file in files:
        size = file.stat().st_size
        header = _safetensors_header(file, size)
        found = _tensors(file, header) if header else None
        if found is None:
            digest.update(canonical_json([file.name, size]) + b"\n")
            plain += _spread(file, size, count=max(16, _MAX_SAMPLES // (2 * len(files))))
        else:
            tensors += found
    tensors.sort(key=lambda tensor: (tensor.name, tensor.span.path.name))
    for tensor in tensors:
        described = [tensor.name, tensor.dtype, tensor.shape, tensor.span.length]
        digest.update(canonical_json(described) + b"\n")
    candidates = [tensor.sample() for tensor in tensors] + plain
    # Spread over all of them: every n-th, whatever file they are in.
    step = max(1, -(-len(candidates) // _MAX_SAMPLES))
    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="ucm-weights") as threads:
        for data in threads.map(_read, candidates[::step]):
            digest.update(struct.pack("<Q", len(data)) + data)


def _read(span: _FilePart) -> bytes:
    with open(span.path, "rb", buffering=0) as file:
        return os.pread(file.fileno(), span.length, span.start)


def _safetensors_header(file: Path, size: int) -> bytes:
    """The JSON header, or nothing where the file is no safetensors file."""
    if file.suffix != ".safetensors" or size < 8:
        return b""
    (length,) = struct.unpack("<Q", _read(_FilePart(file, 0, 8)))
    if not 0 < length <= min(size - 8, _HEADER_MAX_BYTES):
        return b""
    return _read(_FilePart(file, 8, length))


def _tensors(file: Path, header: bytes) -> list[_Tensor] | None:
    """None for a header that can't be understood."""
    data_start = 8 + len(header)
    tensors: list[_Tensor] = []
    try:
        for name, tensor in json.loads(header).items():
            if name != "__metadata__":
                start, end = map(int, tensor["data_offsets"])
                span = _FilePart(file, data_start + start, max(0, end - start))
                shape = [int(size) for size in tensor["shape"]]
                tensors.append(_Tensor(name, str(tensor["dtype"]), shape, span))
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return tensors


def _spread(file: Path, size: int, *, count: int) -> Iterator[_FilePart]:
    """Both ends, and `count` samples between them."""
    yield _FilePart(file, 0, min(size, _END_BYTES))
    yield _FilePart(file, max(0, size - _END_BYTES), min(size, _END_BYTES))
    room = max(0, size - _SAMPLE_BYTES)
    for index in range(count):
        yield _FilePart(file, room * index // count, min(size, _SAMPLE_BYTES))
