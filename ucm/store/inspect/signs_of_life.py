"""Does storage still answer a process? Told from outside, as whoever waits for it can't tell.

Each call of storage that a process makes is seen as it begins (what Python tells of: audit events),
and its reads and writes as they end (what the kernel counts). While any of these come it gets on,
however long all of it takes. Only what stands still for a while hangs.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from contextlib import suppress
from typing import Final

# A file is looked at: of this Python itself tells nothing.
LOOKED: Final = "ucm.looked"
# A server is asked, and each time given up in time. So until a directory is looked into, or a file.
ASKED: Final = "ucm.asked"

_OF_FILES: Final = frozenset(
    {"open", "os.scandir", "os.listdir", "os.mkdir", "os.rename", "os.remove", "os.link"}
    | {"os.rmdir", "os.utime", "os.walk", "subprocess.Popen", LOOKED}
)
_OF_NO_SERVER: Final = frozenset({LOOKED, "os.scandir", "os.listdir"})
_HEAD: Final = struct.Struct("<QBH")
_PAGE_BYTES: Final = 8192
_MOST_BYTES: Final = 4096
_COUNTED: Final = (b"syscr", b"syscw")


class SignsOfLife:
    """Shared by a parent and the child that it makes after this."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, _PAGE_BYTES)
        self._count = 0
        self._not_storage: tuple[str, ...] = ()

    def watch_this_process(self) -> None:
        """In the child, and until its end."""
        # Modules are looked for as well, and they are not what anybody asks about.
        self._not_storage = tuple(each for each in (*sys.path, sys.base_prefix) if each)
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, args: tuple[object, ...]) -> None:
        if event not in _OF_FILES and event != ASKED:
            return
        # Of several threads at once some may count as one.
        self._count += 1
        where = self._path_in(event, args)
        if where:
            self._shared[_HEAD.size : _HEAD.size + len(where)] = where
        _, is_asked, length = _HEAD.unpack_from(self._shared)
        is_asked = event == ASKED or (is_asked and event not in _OF_NO_SERVER)
        _HEAD.pack_into(self._shared, 0, self._count, is_asked, len(where) or length)

    def _path_in(self, event: str, args: tuple[object, ...]) -> bytes:
        path = args[0] if args else None
        # With a mode by Python's own `open`, which modules and devices are opened by.
        is_other = event == "open" and args[1] is not None
        if is_other or not isinstance(path, str) or not path.startswith("/"):
            return b""
        if path.startswith(self._not_storage):
            return b""
        return path.encode(errors="surrogateescape")[:_MOST_BYTES]

    @property
    def is_bounded(self) -> bool:
        """It waits for a server, and not for a file."""
        return bool(_HEAD.unpack_from(self._shared)[1])

    @property
    def where(self) -> str:
        """What was opened or listed last; empty if nothing was."""
        length = _HEAD.unpack_from(self._shared)[2]
        where = self._shared[_HEAD.size : _HEAD.size + length]
        return where.decode(errors="surrogateescape")

    def number(self, pid: int) -> tuple[int, int]:
        """Differs from an earlier one if the child, or one that it has started, has got on."""
        ended = sum(_calls_ended(each) for each in (pid, *_children_of(pid)))
        return _HEAD.unpack_from(self._shared)[0], ended


def _children_of(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                found += map(int, file.read().split())
    return found


def _calls_ended(pid: int) -> int:
    """Reads and writes; 0 where the kernel doesn't tell."""
    try:
        with open(f"/proc/{pid}/io", "rb") as file:
            lines = [line.split(b":") for line in file.read().splitlines()]
    except OSError:
        return 0
    return sum(int(line[1]) for line in lines if line[0] in _COUNTED)
