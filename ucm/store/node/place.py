"""Where a node cache is found: its directory, the files in it, and who is at the other end.

Whoever owns the socket's name can keep a node from its pages. So the directory must belong to this
user or to root and be writable by nobody else, files in it are not opened through links, and both
ends of a connection check who is at the other one.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from contextlib import suppress

from ucm.errors import ConfigError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def ensure_private_directory(socket_path: str) -> None:
    """Makes the directory of `socket_path` if it is missing. Raises ConfigError for one that
    somebody else could put a socket into."""
    directory = os.path.dirname(socket_path)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        found = (os.lstat(directory), os.stat(directory))
    except OSError as error:
        raise ConfigError(
            f"node_cache_socket: can't make {directory}: {error.strerror}; set it to a path in a "
            f"directory of your own"
        ) from error
    for info in found:
        if not is_trusted(info.st_uid):
            raise ConfigError(
                f"node_cache_socket: {directory} belongs to uid {info.st_uid}, who could pose as "
                f"your node cache: remove it, or set a path in a directory of your own"
            )
    # Also one where nobody can replace what is another's, such as /tmp: anybody may be first there.
    if found[1].st_mode & _OTHERS_WRITE:
        shared = found[1].st_mode & stat.S_ISVTX
        own = f"{directory.rstrip('/')}/ucm/{os.path.basename(socket_path)}"
        raise ConfigError(
            f"node_cache_socket: others may write to {directory}, and could pose as your node "
            f"cache: {f'set it to {own}' if shared else 'chmod 700 it'}, or set a path in a "
            f"directory of your own"
        )


def open_own_file(path: str, flags: int) -> int:
    """A descriptor of a plain file of ours, which is made if it is missing. Raises ConfigError for
    what somebody else has put there."""
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise ConfigError(
            f"node_cache_socket: uid {os.getuid()} can't open {path}: {why}; remove it, or set a "
            f"path in a directory of your own"
        ) from error
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or not is_trusted(info.st_uid) or info.st_nlink > 1:
        os.close(fd)
        raise ConfigError(
            f"node_cache_socket: {path} is not a plain file of uid {os.getuid()}'s own (it belongs "
            f"to uid {info.st_uid}): remove it, or set a path in a directory of your own"
        )
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


def is_trusted(uid: int) -> bool:
    return uid in (0, os.getuid())


def peer_uid(sock: socket.socket) -> int:
    """Who is at the other end of a Unix socket, by the kernel's word."""
    return _credentials(sock)[1]


def peer_pid(sock: socket.socket) -> int:
    """0 for a process that can't be seen from here."""
    return _credentials(sock)[0]


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", found)
    return pid, uid, gid
