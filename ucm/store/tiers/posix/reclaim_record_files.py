"""Keeps the record of what was reclaimed in a backend: two files there, of a bounded length.

Who reclaims appends to `ucm-reclaim-record` after each pool. When that is long enough it takes the
place of `ucm-reclaim-record-before`, and a new one begins: so half a million deletions or more are
on record, in 8 MiB or little more. Nobody needs the record but people. Nothing waits for it to be
on the disk, and what can't be written leaves a gap, which the next batch tells of.

Appends go by the name and to the end each time, so it does no harm that two write, or that somebody
else takes the lease over: at worst the two files change places twice, and less is on record.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Final

from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.os_errors import unless_full
from ucm.store.tiers.posix.plain_files import read_plain
from ucm.store.tiers.posix.reclaim_record import (
    ReclaimsOnRecord,
    encode_reclaims,
    look_up_reclaims,
)
from ucm.store.tiers.posix.rights import FileRights

GENERATION_BYTES: Final = 4 << 20
# Written at a time: far below a generation.
_MAX_MARKS: Final = 1 << 16
_APPEND: Final = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


class ReclaimRecorder:
    """Of one backend, for one thread. `problem`: why what went last is not on record, empty where
    it is, or where there was no room for it."""

    def __init__(self, rights: FileRights) -> None:
        self.problem = ""
        self._rights = rights
        self._is_behind_gap = False

    def record(self, root: int, time_ns: int, marks: Sequence[int]) -> None:
        """`marks` went at `time_ns`. `root` is a descriptor of the backend. Never raises for what
        storage does: reclaim goes on without a record."""
        for start in range(0, len(marks), _MAX_MARKS):
            some = marks[start : start + _MAX_MARKS]
            content = encode_reclaims(time_ns, some, is_behind_gap=self._is_behind_gap)
            self.problem, self._is_behind_gap = "", True
            try:
                with unless_full():
                    self._is_behind_gap = not self._append(root, content)
            except OSError as error:
                self.problem = f"{paths.RECLAIM_RECORD}: {error.strerror or error}"

    def _append(self, root: int, content: bytes) -> bool:
        """Whether all of it is there."""
        fd = _open_unfilled(root)
        if fd is None:
            fd = self._begin(root)
        try:
            return os.write(fd, content) == len(content)
        finally:
            os.close(fd)

    def _begin(self, root: int) -> int:
        fd = os.open(paths.RECLAIM_RECORD, _APPEND | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=root)
        try:
            self._rights.give_file(fd)
        except OSError:
            os.close(fd)
            os.unlink(paths.RECLAIM_RECORD, dir_fd=root)
            raise
        return fd


def reclaims_on_record(backend: str, marks: Collection[int]) -> ReclaimsOnRecord:
    """Raises NotPlain, or OSError, if what lies there can't be read."""
    found = (
        read_plain(path, max_bytes=2 * GENERATION_BYTES)
        for path in paths.reclaim_record_paths(backend)
    )
    return look_up_reclaims(b"".join(content or b"" for content in found), marks)


def _open_unfilled(root: int) -> int | None:
    """The generation to append to; None if a new one is to begin, and nothing is in its way."""
    with suppress(FileNotFoundError, PermissionError):
        fd = os.open(paths.RECLAIM_RECORD, _APPEND, dir_fd=root)
        try:
            if _has_room(os.fstat(fd)):
                return fd
        except OSError:
            os.close(fd)
            raise
        os.close(fd)
    # It is full, or another user's.
    with suppress(FileNotFoundError):
        os.rename(
            paths.RECLAIM_RECORD, paths.RECLAIM_RECORD_BEFORE, src_dir_fd=root, dst_dir_fd=root
        )
    return None


def _has_room(status: os.stat_result) -> bool:
    """Raises OSError for what is no file."""
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is no file")
    return status.st_size < GENERATION_BYTES
