"""Who may read and write what a node makes, and who else may write into a backend.

Without settings the umask of whoever started the node cache decides, which is an accident. With a
mode and a group it doesn't. What is wrong with a backend's own rights is said once, when it is
opened.
"""

from __future__ import annotations

import errno
import grp
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from ucm.errors import ConfigError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileRights:
    """Of files and directories that are made from now on. None leaves it to the umask, and to the
    group of who makes them."""

    file_mode: int | None = None
    gid: int | None = None

    @property
    def directory_mode(self) -> int | None:
        """Whoever may read files may list and enter; files get the directory's group."""
        if self.file_mode is None:
            return None
        enter = (self.file_mode & 0o444) >> 2
        return self.file_mode | enter | 0o300 | (stat.S_ISGID if self.gid is not None else 0)

    def give_file(self, fd: int) -> None:
        """Raises OSError."""
        if self.gid is not None:
            with _saying_group(self.gid):
                os.fchown(fd, -1, self.gid)
        if self.file_mode is not None:
            os.fchmod(fd, self.file_mode)

    def give_directory(self, path: str) -> None:
        """Raises OSError."""
        if self.gid is not None:
            with _saying_group(self.gid):
                os.chown(path, -1, self.gid)
        if self.directory_mode is not None:
            os.chmod(path, self.directory_mode)


@contextmanager
def _saying_group(gid: int) -> Iterator[None]:
    """A server may go by groups of its own, whatever this machine knows of its user."""
    try:
        yield
    except PermissionError as error:
        raise PermissionError(error.errno, _not_in_group(gid)) from error


def _not_in_group(gid: int) -> str:
    """For people."""
    return f"storage does not count uid {os.geteuid()} to file_group {gid}"


# What chown takes for "leave it".
_NO_GROUP: Final = (1 << 32) - 1

UMASK_DECIDES = FileRights()


def file_rights(file_mode: str | None, file_group: str | None) -> FileRights:
    """From the settings: three octal digits, and a group's name or number. Raises ConfigError."""
    gid = None if file_group is None else gid_of("file_group", file_group)
    return FileRights(None if file_mode is None else int(file_mode, 8), gid)


def gid_of(setting: str, group: str) -> int:
    """Of a group's name or number. Raises ConfigError."""
    try:
        if not (group.isascii() and group.isdigit()):
            return grp.getgrnam(group).gr_gid
        if int(group) < _NO_GROUP:
            return int(group)
        raise ConfigError(f"{setting}: {group}: groups have numbers below {_NO_GROUP}")
    except (KeyError, ValueError):
        raise ConfigError(
            f"{setting}: {group}: no such group on this machine: give its number"
        ) from None


def may_read(path: str, status: os.stat_result) -> bool:
    """Whether this process may read a file: by its mode, and asked of the filesystem only where
    that leaves it open, for that may be a question to a server."""
    wanted = stat.S_IRUSR if status.st_uid == os.geteuid() else stat.S_IROTH
    if status.st_mode & wanted:
        return True
    return os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)


def check_may_write(directory: str) -> None:
    """Raises the OSError that a new file in it would be refused with, as far as rights tell."""
    if not _may_write(directory):
        reason = errno.EROFS if _is_read_only(directory) else errno.EACCES
        raise OSError(reason, os.strerror(reason))


def _may_write(directory: str) -> bool:
    return os.access(
        directory, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids
    )


def _is_read_only(path: str) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def is_own(path: str) -> bool:
    """Whether it is this user's. Raises OSError."""
    return os.lstat(path).st_uid == os.geteuid()


def problems(
    mode: int, *, may_write: bool, uid: int, is_sealed: bool, is_read_only: bool = False
) -> list[str]:
    """What a person should know of a directory with these rights. Pure."""
    found = []
    if not may_write:
        found.append(
            f"uid {uid} may not write here: pages of this node stay in its memory, and what others "
            f"have stored is read; give it the right, or run all nodes as one user"
        )
    if not may_write and uid == 0 and not is_read_only:
        found.append(
            "NFS takes root for nobody, unless it is exported with no_root_squash: run node caches "
            "as another user"
        )
    if mode & stat.S_IWOTH and not is_sealed:
        found.append(
            "anybody may write here, and so could forge pages: chmod o-w it, or set page_key_file "
            "(docs/security.md)"
        )
    return found


def say_problems(path: str, *, is_sealed: bool) -> None:
    """Logs them. Raises OSError."""
    mode = os.stat(path).st_mode
    for problem in problems(
        mode,
        may_write=_may_write(path),
        uid=os.geteuid(),
        is_sealed=is_sealed,
        is_read_only=_is_read_only(path),
    ):
        _logger.warning("%s: %s", path, problem)
