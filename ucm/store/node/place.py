"""Where a node cache is found: a socket, the lock beside it, and a directory that is its owner's.

Whoever owns the socket's name can feed pages to a model. So the directory must belong to this user
or to root and be writable by nobody else, and both ends check who is at the other one.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
from pathlib import Path

from ucm.errors import ConfigError, NodeUnavailable

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
    mode = found[1].st_mode
    # In a sticky directory such as /tmp nobody can replace what is another's.
    if mode & _OTHERS_WRITE and not mode & stat.S_ISVTX:
        raise ConfigError(
            f"node_cache_socket: others may write to {directory}, and could pose as your node "
            f"cache: chmod 700 it, or set a path in a directory of your own"
        )


def is_trusted(uid: int) -> bool:
    return uid in (0, os.getuid())


def peer_uid(sock: socket.socket) -> int:
    """Who is at the other end of a Unix socket, by the kernel's word."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)


class SocketLock:
    """The right to serve at a socket path; held while the object lives, lost with the process."""

    def __init__(self, socket_path: str) -> None:
        """Raises NodeUnavailable when another process holds it, ConfigError when the directory is
        not to be trusted."""
        ensure_private_directory(socket_path)
        self.path = Path(socket_path)
        lock_path = f"{socket_path}.lock"
        self._fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise NodeUnavailable(f"another node cache serves at {socket_path}") from error

    def listen(self) -> socket.socket:
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        umask = os.umask(0o177)
        try:
            listener.bind(str(self.path))
        finally:
            os.umask(umask)
        listener.listen(256)
        listener.setblocking(False)
        return listener

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._fd)
