"""Where a node cache is found: its directory, and the files in it.

Whoever owns the socket's name can keep a node from its pages. So the directory must belong to this
user or to root and be writable by nobody else, and files in it are not opened through links.

With a group (`trusted_users.py`), the directory is the group's: its members write to it, and what
is made in it belongs to the group by the directory's set-group-ID bit. No right is ever given by a
file's name: a member could have put something else there.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from contextlib import suppress
from typing import Final

from ucm.errors import ConfigError
from ucm.store.node.trusted_users import OWN_USER, Trust

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_FOR_GROUP: Final = stat.S_ISGID | stat.S_IRWXG
_DIRECTORY_MODE: Final = 0o700
_FILE_MODE: Final = 0o600
_SHORTAGES: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT, errno.EIO}
)


def is_shortage(error: BaseException | None) -> bool:
    """Whether it says nothing about who owns a place, only that the machine lacks something now."""
    return isinstance(error, OSError) and error.errno in _SHORTAGES


def ensure_private_directory(socket_path: str, trust: Trust = OWN_USER) -> None:
    """Makes the directory of `socket_path` if it is missing. Raises ConfigError for one that
    somebody else could put a socket into, or that the group can't use."""
    directory = os.path.dirname(socket_path)
    try:
        _make_directory(directory, trust)
        found = (os.lstat(directory), os.stat(directory))
    except OSError as error:
        raise ConfigError(
            f"node_cache_socket: can't make {directory}: {error.strerror}; set it to a path in a "
            f"directory of your own"
        ) from error
    for info in found:
        if not trust.owner(info):
            raise ConfigError(
                f"node_cache_socket: {directory} belongs to uid {info.st_uid}, who could pose as "
                f"your node cache: remove it, or set a path in a directory of your own"
            )
    if trust.gid is not None:
        _check_group_directory(directory, found[1], trust.gid)
    # Also one where nobody can replace what is another's, such as /tmp: anybody may be first there.
    elif found[1].st_mode & _OTHERS_WRITE:
        shared = found[1].st_mode & stat.S_ISVTX
        own = f"{directory.rstrip('/')}/ucm/{os.path.basename(socket_path)}"
        raise ConfigError(
            f"node_cache_socket: others may write to {directory}, and could pose as your node "
            f"cache: {f'set it to {own}' if shared else 'chmod 700 it'}, or set a path in a "
            f"directory of your own"
        )


def _check_group_directory(directory: str, info: os.stat_result, gid: int) -> None:
    is_theirs = info.st_gid == gid and info.st_mode & _FOR_GROUP == _FOR_GROUP
    if not is_theirs or info.st_mode & (stat.S_IWOTH | stat.S_ISVTX):
        raise ConfigError(
            f"node_cache_group: {directory} is not the group's alone: chgrp {gid} and chmod 2770 "
            f"it, or set node_cache_socket to a path in a directory that is missing"
        )


def _make_directory(directory: str, trust: Trust) -> None:
    """If it is missing. Whole, with all its rights: others may be about to use it. Raises
    OSError."""
    if trust.gid is None:
        os.makedirs(directory, mode=_DIRECTORY_MODE, exist_ok=True)
        return
    if os.path.lexists(directory):
        return
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    temporary = f"{directory}.{uuid.uuid4().hex}"
    os.mkdir(temporary, _DIRECTORY_MODE)
    try:
        # Not by name: where others may write, it may lead elsewhere by now.
        fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.fchown(fd, -1, trust.gid)
            os.fchmod(fd, _DIRECTORY_MODE | _FOR_GROUP)
        finally:
            os.close(fd)
        # Where another has made it meanwhile, that one is as good.
        with suppress(OSError):
            os.rename(temporary, directory)
            return
        os.rmdir(temporary)
    except OSError:
        with suppress(OSError):
            os.rmdir(temporary)
        raise


def open_own_file(path: str, flags: int, trust: Trust = OWN_USER) -> int:
    """A descriptor of a plain file of ours, or of the group's, which is made if it is missing.
    Raises ConfigError for what somebody else has put there."""
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = _make_file(path, flags, trust)
        if fd is None:
            fd = os.open(path, flags | os.O_CREAT, _FILE_MODE)
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise ConfigError(
            f"node_cache_socket: uid {os.getuid()} can't open {path}: {why}; remove it, or set a "
            f"path in a directory of your own"
        ) from error
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or not trust.owner(info) or info.st_nlink > 1:
        os.close(fd)
        raise ConfigError(
            f"node_cache_socket: {path} is not a plain file of uid {os.getuid()}'s own (it belongs "
            f"to uid {info.st_uid}): remove it, or set a path in a directory of your own"
        )
    return fd


def check_socket_name(path: str) -> None:
    """Raises ConfigError for what is no socket: it is somebody's, and not ours to remove."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # whoever needs it says so
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"node_cache_socket: {path} is there, and is no socket: remove it, or set another path"
        )


def _make_file(path: str, flags: int, trust: Trust) -> int | None:
    """A new one, with the group's rights; None when there is something already, which must not get
    any. Raises OSError."""
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, _FILE_MODE)
    except FileExistsError:
        if flags & os.O_EXCL:
            raise
        return None
    if trust.gid is not None:
        os.fchmod(fd, _FILE_MODE | stat.S_IRGRP | stat.S_IWGRP)
    return fd


def is_file_at(fd: int, path: str) -> bool:
    """Whether the file that is open as `fd` still has this name."""
    try:
        there, opened = os.lstat(path), os.fstat(fd)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino)


def owner_of(path: str) -> int:
    """Whose it is, or, where that can't be seen from here, whose its directory is; -1: nobody's."""
    for each in (path, os.path.dirname(path)):
        with suppress(OSError):
            return os.lstat(each).st_uid
    return -1
