"""Whether a storage backend is the one that this process has opened.

A mount that goes away leaves an ordinary directory behind, on a disk that nobody else sees, and
all that would be written there would be lost to everybody. So each backend holds an id in a file.
It is made at two places only: by `ucm init`, and when a process opens a backend that has none.
From then on this process remembers the id and the file that it lay in, by device and inode, and by
when it was written and its size, for it may be edited in place:

    the same file              it is here: one look, without reading
    another file, the same id  it was mounted again; here, unless a filesystem of this machine alone
                               has taken the place of a shared one
    another id, or none        it is away: nothing is written, and nothing is found

What is away is said once, and so is its return, which needs no restart.

A mount may go between a look and what follows it. So directories are made by a descriptor of the
backend that was looked at through itself (`pinned`). A file that is made by its path a moment later
finds no directory on the disk below, and so isn't made there.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.filesystem import mount_of

_logger = logging.getLogger(__name__)


class BackendAway(TierError):
    """Something else lies where the backend was."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=Outcome.IO_ERROR)


@dataclass(frozen=True)
class Place:
    """Where an id was read: its file, and whether only this machine can see it."""

    file: tuple[int, ...]
    is_local: bool


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """Of one file, and what was written into it."""
    return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)


def why_away(known: tuple[int, Place], found: tuple[int, Place] | None) -> str:
    """For people; empty if what was found is what is known."""
    if found is None:
        return "there is no id"
    if found[0] != known[0]:
        return f"the id there is {found[0]:016x}"
    if found[1].is_local and not known[1].is_local:
        return "its id is there on a filesystem of this machine alone"
    return ""


class Identity:
    """Of one backend, in this process. Thread-safe."""

    def __init__(
        self, path: str, *, locate: Callable[[], os.stat_result | None], read: Callable[[], int]
    ) -> None:
        """`locate` looks at the file of the id, None without one; `read` reads it. Both raise
        TierError if storage can't tell."""
        self._path = path
        self._locate = locate
        self._read = read
        self._lock = threading.Lock()
        self._known: tuple[int, Place] | None = None
        self._is_away = False
        # Of times that the place was found to be another one, or came back: what was remembered of
        # its files and directories before is worth nothing.
        self.generation = 0

    @property
    def id(self) -> int | None:
        """None until it was found once."""
        return None if self._known is None else self._known[0]

    def look(self) -> int | None:
        """The id of what is here, remembering it if none was known; None if there is none and none
        was known. Raises BackendAway, or TierError if storage can't tell."""
        status = self._locate()
        known = self._known
        is_known = known is not None and status is not None and known[1].file == _stamp(status)
        if known is not None and is_known and not self._is_away:
            return known[0]
        with self._lock:
            found = None if status is None else (self._read(), self._place(status))
            if self._known is None:
                self._known = found
                return None if found is None else found[0]
            self._compare(self._known, found)
            return self._known[0]

    def check(self) -> None:
        """Before anything is made or published. Raises BackendAway, or TierError."""
        if self.look() is None:
            raise BackendAway(
                f"{self._path}: has no id, so it may be a mount point without its mount: mount it, "
                f"or make a new storage backend of it with `ucm init {self._path}`"
            )

    @contextmanager
    def pinned(self) -> Iterator[int]:
        """A descriptor of the directory that is known, whatever its path leads to meanwhile; of
        what is there, while nothing is known. Raises BackendAway, TierError or OSError."""
        fd = os.open(self._path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if self._known is not None and not self._is_known(fd):
                self.check()  # another file may have the id now
                if not self._is_known(fd):
                    raise BackendAway(f"{self._path}: has changed just now, tried again later")
            yield fd
        finally:
            os.close(fd)

    def _is_known(self, fd: int) -> bool:
        known = self._known
        try:
            status = os.stat(paths.BACKEND_ID, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return known is not None and known[1].file == _stamp(status)

    def is_here(self) -> bool:
        """Whether what is found here counts. Raises TierError if storage can't tell."""
        try:
            self.look()
        except BackendAway:
            return False
        return True

    def _compare(self, known: tuple[int, Place], found: tuple[int, Place] | None) -> None:
        why = why_away(known, found)
        if why:
            away = BackendAway(
                f"{self._path}: this is not the storage backend {known[0]:016x} any more ({why}): "
                f"nothing is written there, and nothing found, until it is mounted again "
                f"(if it was emptied by hand: `ucm init --id {known[0]:016x} {self._path}`)"
            )
            if not self._is_away:
                _logger.error("%s", away)
            self._is_away = True
            raise away
        assert found is not None
        if found != known:
            self._known, self.generation = found, self.generation + 1
        if self._is_away:
            self.generation += 1
            _logger.warning("%s: storage backend %016x is back", self._path, known[0])
        self._is_away = False

    def _place(self, status: os.stat_result) -> Place:
        try:
            mount = mount_of(self._path)
        except OSError:
            mount = None
        return Place(_stamp(status), mount is not None and mount.is_local)
