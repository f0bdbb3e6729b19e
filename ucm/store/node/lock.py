"""The lock beside a node cache's socket: who has it serves there, or is about to.

A client takes it and hands it to the process that it starts (the descriptor is inherited), so of
any number of clients one starts one node cache. Its file says who has it, and how often a start
has failed since one served.

The kernel frees the lock of a process that has ended, but for one case: its first thread is dead
and another hangs in a read that no signal ends. Such a lock counts as free. A new file is put in
its place, so a lock is only held by who has the file that is there now (`is_held`).
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from ucm.errors import NodeUnavailable
from ucm.store.node.rendezvous import (
    check_socket_name,
    ensure_private_directory,
    is_file_at,
    open_own_file,
)
from ucm.store.node.trusted_users import OWN_USER, Trust
from ucm.store.processes import num_threads, pid_namespace, state_and_start

_TRIES: Final = 5
_DYING_S: Final = 0.5
_MAX_RECORD_BYTES: Final = 4096
_BACKLOG: Final = 256
# Locks that this process has now. A child that is forked meanwhile must not keep them.
_held: set[int] = set()


def _forget_held() -> None:
    for fd in _held:
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_forget_held)


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """What the lock's file says. `pid` is 0 between its start and its first line of code; pids only
    mean something in their namespace. `failures` counts starts since the last that served; `why`
    says for people what the last start has ended by."""

    pid: int = 0
    pid_namespace: str = ""
    pid_started: str = ""
    tried_s: float = 0.0
    failures: int = 0
    why: str = ""


class SocketLock:
    """The right to serve at a socket path. Held until `release` or `handed_over`, or the process's
    end."""

    def __init__(self, socket_path: str, fd: int, trust: Trust = OWN_USER) -> None:
        self.path = Path(socket_path)
        self._trust = trust
        self._lock_path = lock_path(socket_path)
        self._fd = fd
        self._socket_inode: tuple[int, int] | None = None
        _held.add(fd)

    @classmethod
    def adopt(cls, socket_path: str, fd: int, trust: Trust) -> SocketLock:
        """The lock that the starter of this process has handed over."""
        os.set_inheritable(fd, False)
        return cls(socket_path, fd, trust)

    @property
    def fd(self) -> int:
        """To be inherited by the process that the lock is for."""
        return self._fd

    @property
    def holder(self) -> Holder:
        return _read_holder(self._fd)

    def note(self, holder: Holder) -> None:
        data = msgspec.json.encode(holder)
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))

    def is_held(self) -> bool:
        """Whether the lock's file is still the one beside the socket."""
        return is_file_at(self._fd, self._lock_path)

    def renew(self) -> bool:
        """Takes the lock that is beside the socket now, in place of one whose file has gone. False:
        another process has it. Raises ConfigError and OSError, and then has what it had."""
        if self.is_held():
            with suppress(OSError):
                os.utime(self._fd)  # those who clear up old files should let it be
            return True
        other = try_lock(str(self.path), self._trust)
        if other is None:
            return False
        try:
            other.note(self.holder)
        except OSError:
            other.release()
            raise
        self._close()
        self._fd = other.fd
        return True

    def listen(self) -> socket.socket:
        """In place of a socket that has the name. Raises ConfigError and OSError."""
        check_socket_name(str(self.path))
        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # Its group is the directory's.
        umask = os.umask(0o177 if self._trust.gid is None else 0o117)
        try:
            listener.bind(str(self.path))
        except OSError:
            listener.close()
            raise
        finally:
            os.umask(umask)
        self._socket_inode = _inode_of(self.path)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        return listener

    def is_listening(self) -> bool:
        """Whether the socket's name still leads to what `listen` has made."""
        return self._socket_inode is not None and _inode_of(self.path) == self._socket_inode

    def handed_over(self) -> None:
        """Another process has inherited the lock: it stays locked."""
        self._close()

    def release(self) -> None:
        """Removes the socket, if it is the own one."""
        if self.is_listening():
            self.path.unlink(missing_ok=True)
        with suppress(OSError):
            # Also for a process that has inherited it against all rules.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._close()

    def _close(self) -> None:
        _held.discard(self._fd)
        os.close(self._fd)


def lock_path(socket_path: str) -> str:
    return f"{socket_path}.lock"


def try_lock(socket_path: str, trust: Trust = OWN_USER) -> SocketLock | None:
    """The lock of `socket_path`; None while another process has it. Raises ConfigError where the
    directory or the file is not to be trusted."""
    ensure_private_directory(socket_path, trust)
    check_socket_name(socket_path)
    path = lock_path(socket_path)
    for _ in range(_TRIES):
        fd = open_own_file(path, os.O_RDWR, trust)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            new_fd = _replace(path, fd, trust) if _is_held_by_the_dead(fd) else None
            os.close(fd)
            if new_fd is None:
                return None
            fd = new_fd
        if is_file_at(fd, path):
            return SocketLock(socket_path, fd, trust)
        # Another file has come to this name since it was opened.
        os.close(fd)
    return None


def take_lock(socket_path: str, trust: Trust = OWN_USER) -> SocketLock:
    """`try_lock` for who has nothing to wait for. Raises NodeUnavailable."""
    lock = try_lock(socket_path, trust)
    if lock is None:
        raise NodeUnavailable(f"another node cache serves at {socket_path}")
    return lock


def this_process(*, failures: int, tried_s: float) -> Holder:
    return Holder(
        pid=os.getpid(),
        pid_namespace=pid_namespace(),
        pid_started=state_and_start(os.getpid())[1],
        tried_s=tried_s,
        failures=failures,
    )


def is_undead(holder: Holder) -> bool:
    """Whether the holder's first thread has ended, and others, that run no code of ours any more,
    keep its files open."""
    if not holder.pid or holder.pid_namespace != pid_namespace():
        return False
    if state_and_start(holder.pid) != ("Z", holder.pid_started):
        return False
    return num_threads(holder.pid) > 1


def why_held_up(socket_path: str) -> str:
    """What the lock says for people of why nobody answers at a socket; empty if it says nothing."""
    try:
        fd = os.open(lock_path(socket_path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        holder = _read_holder(fd)
        if holder.why:
            return f"the last one that was started has ended: {holder.why}"
        if not holder.pid:
            return ""
        said = f"pid {holder.pid} holds the lock and does not answer"
        if holder.pid_namespace != pid_namespace():
            return f"{said} (a pid of another container)" if _is_locked(fd) else ""
    finally:
        os.close(fd)
    state, started = state_and_start(holder.pid)
    if started != holder.pid_started:
        return ""
    return f"{said}: it is stopped, kill -CONT {holder.pid} lets it go on" if state == "T" else said


def _is_locked(fd: int) -> bool:
    """Of what is open as `fd`. For an instant it is locked for others by that."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _is_held_by_the_dead(fd: int) -> bool:
    """Twice: a process that is being killed looks like that for a moment, and a new holder has the
    lock a moment before it says so."""
    holder = _read_holder(fd)
    if not is_undead(holder):
        return False
    time.sleep(_DYING_S)
    return is_undead(holder) and _read_holder(fd) == holder


def _replace(path: str, dead_fd: int, trust: Trust) -> int | None:
    """A locked file in place of the one that the dead hold."""
    temporary = f"{path}.{uuid.uuid4().hex}"
    fd = open_own_file(temporary, os.O_RDWR | os.O_EXCL, trust)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if not is_file_at(dead_fd, path):
        os.unlink(temporary)
        os.close(fd)
        return None
    os.rename(temporary, path)
    return fd


def _read_holder(fd: int) -> Holder:
    try:
        return msgspec.json.decode(os.pread(fd, _MAX_RECORD_BYTES, 0), type=Holder)
    except (OSError, msgspec.DecodeError):
        return Holder()


def _inode_of(path: Path) -> tuple[int, int] | None:
    try:
        info = os.lstat(path)
    except OSError:
        return None
    return (info.st_dev, info.st_ino)
