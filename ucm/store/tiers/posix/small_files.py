"""Small files in a backend that are replaced as a whole, by a descriptor of its directory.

Who reads one gets an old or a new content, never a part. No link is followed. What else lies under
such a name is said in words that name it: it is in the way until somebody removes it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.plain_files import NotPlain, read_plain
from ucm.store.tiers.posix.rights import FileRights

# Some hundred nodes in one file.
_MAX_BYTES = 1 << 20
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def read_small(root: int, name: str) -> bytes | None:
    """None if there is none. Raises NotPlain for what is no such file, TierError for one that this
    user may not read, and OSError."""
    try:
        return read_plain(name, max_bytes=_MAX_BYTES, directory=root)
    except NotPlain as error:
        raise NotPlain(f"{name}: {error}; remove it") from error
    except PermissionError as error:
        raise TierError(
            f"{name}: this user may not read it: let its group (file_group, file_mode)",
            reason=Outcome.IO_ERROR,
        ) from error


def write_small(root: int, name: str, content: bytes, rights: FileRights) -> int:
    """Puts `content` in the place of what is there, if that is no directory. Returns the file's
    time of change in nanoseconds, which is the filesystem's own. Raises NotPlain, and OSError."""

    def rename(temp: str) -> None:
        try:
            os.rename(temp, name, src_dir_fd=root, dst_dir_fd=root)
        except IsADirectoryError as error:
            raise NotPlain(f"{name}: is a directory and no file; remove it") from error

    _make(root, name, content, rights, rename)
    return os.stat(name, dir_fd=root, follow_symlinks=False).st_mtime_ns


def link_small(root: int, name: str, content: bytes, rights: FileRights) -> bool:
    """Makes the file. False: there is one. Where the filesystem has no hard links, two that make
    it in one instant both succeed, and the later one's content stays. Raises OSError."""

    def link(temp: str) -> None:
        try:
            os.link(temp, name, src_dir_fd=root, dst_dir_fd=root, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            os.rename(temp, name, src_dir_fd=root, dst_dir_fd=root)

    try:
        _make(root, name, content, rights, link)
    except FileExistsError:
        return False
    return True


def _write_all(fd: int, content: bytes) -> None:
    """Storage may take a part of it, as a disk that is getting full does."""
    left = memoryview(content)
    while left:
        num_written = os.write(fd, left)
        if num_written == 0:
            raise OSError(errno.EIO, "storage takes no more bytes, and doesn't say why")
        left = left[num_written:]


def _make(
    root: int, name: str, content: bytes, rights: FileRights, put: Callable[[str], None]
) -> None:
    temp = os.path.basename(paths.temp_path(f"/{name}"))
    try:
        fd = os.open(temp, _WRITE, 0o666, dir_fd=root)
        try:
            rights.give_file(fd)
            _write_all(fd, content)
        finally:
            os.close(fd)
        put(temp)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temp, dir_fd=root)
