"""Opens files and directories of the store, and nothing that only looks like one.

Whoever can write into a storage backend can put a FIFO, a device, a directory or a link where a
page belongs. A FIFO takes the thread that opens it for good, and what is written through a link
lands outside of the store. So files are opened without waiting and without following a link, looked
at before they are read, and directories below the backend are links never.
"""

from __future__ import annotations

import errno
import os
import stat

from ucm.errors import TierError
from ucm.outcome import Outcome

# For a directory of the store, and never through a link.
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
    stat.S_IFSOCK: "a socket",
}
# What open says of links, sockets and devices without a driver.
_NOT_OPENED = frozenset({errno.ELOOP, errno.ENXIO, errno.ENODEV})


class NotPlain(TierError):
    """Something else lies where a file or a directory of the store belongs."""

    def __init__(self, message: str) -> None:
        super().__init__(message, reason=Outcome.CORRUPT)


def open_plain(path: str, flags: int = 0, *, directory: int | None = None) -> int:
    """A descriptor of the regular file at `path`, for reading; `directory` is an open one that it
    may be in. Raises NotPlain, or OSError."""
    fd, _ = open_sized(path, flags, directory=directory)
    return fd


def open_sized(path: str, flags: int = 0, *, directory: int | None = None) -> tuple[int, int]:
    """`open_plain`, and how many bytes the file has: of one question for both."""
    flags |= os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, dir_fd=directory)
    except OSError as error:
        if error.errno not in _NOT_OPENED:
            raise
        kind = _kind(os.stat(path, dir_fd=directory, follow_symlinks=False))
        if not kind:
            raise
        raise NotPlain(f"is {kind} and no file") from error
    status = os.fstat(fd)
    kind = _kind(status)
    if kind:
        os.close(fd)
        raise NotPlain(f"is {kind} and no file")
    return fd, status.st_size


def read_plain(path: str, *, max_bytes: int, directory: int | None = None) -> bytes | None:
    """All of a small file; None if there is none. Raises NotPlain, also for one that is larger, and
    OSError."""
    try:
        fd = open_plain(path, directory=directory)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise NotPlain(f"has more than {max_bytes} bytes")
    return content


def check_directory(path: str) -> None:
    """Raises NotPlain if `path` is no directory, or a link to one; OSError if it can't be told."""
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise NotPlain(f"{path}: is {_kind(status) or 'a file'} and no directory; remove it")


def _kind(status: os.stat_result) -> str:
    """For people; empty for a regular file."""
    return _KINDS.get(stat.S_IFMT(status.st_mode), "")
