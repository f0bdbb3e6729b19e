"""LoRA adapters, named by their content, as long as it can be known to be what vLLM computes with.

vLLM loads an adapter when it is registered or first used, keeps as many as --max-cpu-loras, and
reads those it has thrown out again from the same path, whatever lies there by then. So a name holds
while the files are those that it was made of: size, time of change and inode, looked at before each
lookup and again before each commit. Once they are others, nobody knows which weights an engine has
in memory, and requests of that adapter go without the store until it is loaded under a new id.

Not seen: files rewritten after vLLM loaded them and before the first request for them. Write a new
adapter to a new path.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucm.errors import UnsupportedEngine
from ucm.store.blocks.canonical_json import canonical_json
from ucm.store.blocks.weights import adapter_files, lora_digest

logger = logging.getLogger(__name__)

_MAX_ADAPTERS = 65_536
_Snapshot = tuple[tuple[str, int, int, int], ...]


@dataclass(eq=False)
class _Adapter:
    """What one id has stood for: without a `digest`, for more than one content."""

    path: str
    files: _Snapshot
    digest: bytes | None


class AdapterNames:
    """For one thread: looks at disks. `rules` is what of the engine's settings decides how an
    adapter is applied."""

    def __init__(self, rules: str = "") -> None:
        self._rules = rules
        self._known: dict[int, _Adapter] = {}
        self._warned: set[int] = set()

    def digest(self, lora_request: Any) -> bytes | None:
        """The adapter's name, if its files are those that have it. None: its requests bypass the
        store."""
        number, path = int(lora_request.lora_int_id), str(lora_request.lora_path)
        if getattr(lora_request, "load_inplace", False):
            self._lose(number, path, "it is loaded in place of another one under the same id")
            return None
        try:
            folder = resolved(path)
            files = _snapshot(folder)
            known = self._known.get(number)
            if known is None:
                return self._name(number, path, folder, files, lora_request)
        except (OSError, UnsupportedEngine) as error:
            # Not for good: vLLM may not have downloaded it yet.
            self._warn(number, path, str(error))
            return None
        if known.digest is not None and (known.path, known.files) != (path, files):
            self._lose(number, path, "its files are others than those first seen under its id")
        return known.digest

    def _name(
        self, number: int, path: str, folder: Path, files: _Snapshot, lora_request: Any
    ) -> bytes | None:
        if len(self._known) >= _MAX_ADAPTERS:
            self._warn(number, path, f"there have been {_MAX_ADAPTERS} adapters before it")
            return None
        digest = lora_digest(folder)
        if _snapshot(folder) != files:
            self._lose(number, path, "its files changed while they were read")
            return None
        rules = [self._rules, bool(getattr(lora_request, "is_3d_lora_weight", False))]
        if rules != ["", False]:
            digest = hashlib.sha256(digest + canonical_json(rules)).digest()
        self._known[number] = _Adapter(path, files, digest)
        return digest

    def _lose(self, number: int, path: str, why: str) -> None:
        known = self._known.setdefault(number, _Adapter(path, (), None))
        known.digest = None
        self._warn(number, path, f"{why}: load it under a new id (unload it, load it again)")

    def _warn(self, number: int, path: str, why: str) -> None:
        """Once for each id."""
        if number in self._warned or len(self._warned) >= _MAX_ADAPTERS:
            return
        self._warned.add(number)
        logger.warning("requests for the LoRA adapter %s bypass the store: %s", path, why)


def resolved(lora_path: str) -> Path:
    """Where vLLM reads an adapter from: as its get_adapter_absolute_path, but nothing is downloaded
    here. Raises UnsupportedEngine for what is not on this machine."""
    if os.path.isabs(lora_path):
        return Path(lora_path)
    if lora_path.startswith("~"):
        return Path(lora_path).expanduser()
    if os.path.exists(lora_path):
        return Path(lora_path).absolute()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(lora_path, local_files_only=True))
    except Exception as error:
        raise UnsupportedEngine(f"it is not on this machine ({error})") from error


def _snapshot(folder: Path) -> _Snapshot:
    """Opens each file: over NFS, only that is sure to ask the server."""
    found = []
    for file in adapter_files(folder):
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            stat = os.fstat(fd)
        finally:
            os.close(fd)
        found.append((str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return tuple(found)
