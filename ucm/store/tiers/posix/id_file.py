"""The file that a backend's id is in."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.os_errors import is_gone, tier_error
from ucm.store.tiers.posix.revalidate import is_there_now
from ucm.store.tiers.posix.written_once import read_once

ID_BYTES = 8
_LOOK_NOW_EVERY_S = 1.0


class IdFile:
    """Of the backend at `path`. Thread-safe."""

    def __init__(self, path: str) -> None:
        self._above = os.path.dirname(path)
        self._path = paths.backend_id_path(path)
        self._was_there = False
        self._looked_now_s = float("-inf")

    def locate(self) -> os.stat_result | None:
        """None if it isn't there. Raises TierError if storage can't tell."""
        try:
            found = os.lstat(self._path)
        except OSError as error:
            if is_gone(error) or isinstance(error, NotADirectoryError):
                return self._locate_now() if self._was_there else None
            raise tier_error(self._path, "can't be looked up", error) from error
        self._was_there = True
        return found

    def _locate_now(self) -> os.stat_result | None:
        """An NFS client that has once looked while its server showed something else remembers that
        it is missing, perhaps for good. To look past that costs a few requests: now and then."""
        now_s = time.monotonic()
        if now_s - self._looked_now_s >= _LOOK_NOW_EVERY_S:
            self._looked_now_s = now_s
            with suppress(OSError):
                if is_there_now(self._path, below=self._above):
                    return os.lstat(self._path)
        return None

    def read(self) -> int:
        """The id. Raises TierError."""
        content = read_once(self._path)
        if content is None:
            raise TierError(f"{self._path}: was there a moment ago", reason=Outcome.IO_ERROR)
        return parse_id(self._path, content)


def parse_id(path: str, content: bytes) -> int:
    text = content.strip()
    try:
        if len(text) == 2 * ID_BYTES:
            return int(text, 16)
    except ValueError:
        pass
    raise TierError(f"{path}: not the id of a storage backend", reason=Outcome.CORRUPT)
