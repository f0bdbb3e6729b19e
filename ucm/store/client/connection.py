"""One connection to a node cache.

Not thread-safe: one thread owns a client. `send` and `poll` never block longer than told; once a
connection has failed they raise NodeUnavailable. Its owner closes it then: closing is the promise
that this process copies nothing any more, and the node cache may be alive.
"""

from __future__ import annotations

import os
import select
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakSet

from ucm.errors import ConfigError, NodeUnavailable, ProtocolError
from ucm.store.node import protocol as p
from ucm.store.node.rendezvous import owner_of
from ucm.store.node.trusted_users import OWN_USER, Trust, peer_of

if TYPE_CHECKING:
    from typing_extensions import Self

_RECEIVE_BYTES = 1 << 18
# A process that is forked from a client is none: it must keep no connection open, or what the node
# cache holds for the client is held for as long as that process lives.
_open: WeakSet[NodeClient | Ending] = WeakSet()


def _forget_open() -> None:
    for each in list(_open):
        each.forked()


os.register_at_fork(after_in_child=_forget_open)


class NodeClient:
    """A connection after its handshake. Owns the socket and `memory_fd` until `close`."""

    def __init__(self, sock: socket.socket, welcome: p.Welcome, memory_fd: int) -> None:
        self.welcome = welcome
        self.memory_fd = memory_fd
        self._sock = sock
        self._sock.setblocking(False)
        self._frames = p.FrameBuffer()
        self._unsent = bytearray()
        self._closed = False
        self._why_closed = "the connection to the node cache is closed"
        self._failed = ""
        _open.add(self)

    @classmethod
    def connect(
        cls,
        socket_path: str,
        *,
        session: str,
        role: str,
        timeout_s: float,
        trust: Trust = OWN_USER,
    ) -> NodeClient:
        """Connects and shakes hands. Raises NodeUnavailable (nobody there, too slow, or no room),
        ConfigError (another user's) or ProtocolError (somebody else, or another version)."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(timeout_s)
            sock.connect(socket_path)
            peer = peer_of(sock)
            if not trust.peer(peer):
                raise ProtocolError(
                    f"uid {peer.uid} serves at {socket_path}, and is not to be trusted"
                )
            hello = p.Hello(version=p.VERSION, session=session, role=role, pid=os.getpid())
            try:
                sock.sendall(p.encode(hello))
            except BrokenPipeError:
                # Who refuses says why, and hangs up.
                if not sock.recv(1, socket.MSG_PEEK):
                    raise
            welcome, memory_fd = _receive_welcome(sock)
        except PermissionError as error:
            sock.close()
            raise ConfigError(
                f"node_cache_socket: {socket_path} is uid {owner_of(socket_path)}'s, and this "
                f"process is uid {os.getuid()}: a node cache serves its own user and root; run "
                f"all engines of it as one user, name a group for all of them (node_cache_group), "
                f"or set a path of your own"
            ) from error
        except OSError as error:
            sock.close()
            raise NodeUnavailable(f"no node cache answers at {socket_path}: {error}") from error
        except (NodeUnavailable, ProtocolError):
            sock.close()
            raise
        return cls(sock, welcome, memory_fd)

    def send(self, message: p.ClientMessage) -> None:
        """Queues a message and sends what the socket takes now."""
        self._unsent += p.encode(message)
        self._flush()

    def poll(self, timeout_s: float = 0.0) -> list[p.NodeMessage]:
        """What has arrived, after waiting at most `timeout_s` for the first of it. What the socket
        has not taken yet is sent meanwhile."""
        deadline_s = time.monotonic() + timeout_s
        self._flush()
        messages = self._receive()
        while not messages and timeout_s > 0 and (left_s := deadline_s - time.monotonic()) > 0:
            # Not select.select: engines have more than 1024 files open.
            poller = select.poll()
            poller.register(self._sock, select.POLLIN | (select.POLLOUT if self._unsent else 0))
            poller.poll(left_s * 1000)
            self._flush()
            messages = self._receive()
        return messages

    def fileno(self) -> int:
        """For owners that wait for several things at once."""
        return self._sock.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether something waits until the socket takes it."""
        return bool(self._unsent)

    @property
    def is_lost(self) -> bool:
        """The connection has failed: who served it is gone, or has dropped this client."""
        return bool(self._failed)

    def ending(self) -> Ending:
        """To be made by the owner, for another thread that waits for the connection's end."""
        return Ending(self._sock.dup())

    def forked(self) -> None:
        """In the child: the connection is its parent's, and goes on."""
        if not self._closed:
            self._closed = True
            self._why_closed = (
                f"this process was forked from {os.getppid()}, whose connection it is"
            )
            self._sock.close()
            os.close(self.memory_fd)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            with suppress(OSError):
                # A duplicate would keep the connection open.
                self._sock.shutdown(socket.SHUT_RDWR)
            self._sock.close()
            os.close(self.memory_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _flush(self) -> None:
        if self._closed:
            raise NodeUnavailable(self._why_closed)
        if self._failed:
            raise NodeUnavailable(self._failed)
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            if len(self._unsent) > p.MAX_UNSENT_BYTES:
                self._fail("it has stopped reading")
        except OSError as error:
            self._fail(str(error))

    def _receive(self) -> list[p.NodeMessage]:
        messages: list[p.NodeMessage] = []
        while True:
            try:
                data = self._sock.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                return messages
            except OSError as error:
                self._fail(str(error))
            if not data:
                if messages:
                    return messages  # the next call finds the end again
                self._fail("it has closed the connection")
            messages += [p.decode_node(body) for body in self._frames.feed(data)]

    def _fail(self, why: str) -> None:
        self._failed = f"lost the node cache (pid {self.welcome.pid}): {why}"
        raise NodeUnavailable(self._failed)


class Ending:
    """The end of a connection, whichever side brings it about. Owned by the thread that waits."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        _open.add(self)

    def forked(self) -> None:
        self._sock.close()

    def wait(self) -> None:
        """Until the connection has ended. What it has brought before can still be polled."""
        poller = select.poll()
        poller.register(self._sock, select.POLLRDHUP)
        poller.poll()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._sock.close()


def _receive_welcome(sock: socket.socket) -> tuple[p.Welcome, int]:
    """And the memory that came with it. Whatever it raises, no descriptor stays open: who is
    refused tries again and again."""
    data, fds, _, _ = socket.recv_fds(sock, _RECEIVE_BYTES, 1)
    try:
        welcome = _read_welcome(sock, data, num_fds=len(fds))
        if os.fstat(fds[0]).st_size != welcome.capacity_bytes:
            raise ProtocolError(
                f"the node cache (pid {welcome.pid}) speaks of other memory than it has passed"
            )
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return welcome, fds[0]


def _read_welcome(sock: socket.socket, data: bytes, *, num_fds: int) -> p.Welcome:
    """`data` is its beginning, with which descriptors came."""
    frames = p.FrameBuffer()
    bodies = frames.feed(data)
    while data and not bodies:
        data = sock.recv(_RECEIVE_BYTES)
        bodies = frames.feed(data)
    welcome = p.decode_node(bodies[0]) if bodies else None
    if isinstance(welcome, p.Notice):
        raise NodeUnavailable(f"the node cache refuses this client: {welcome.text}")
    if not isinstance(welcome, p.Welcome) or len(bodies) > 1 or num_fds != 1:
        raise ProtocolError("the peer on the node cache socket did not answer with its memory")
    if welcome.version != p.VERSION:
        raise ProtocolError(
            f"the node cache (pid {welcome.pid}) speaks protocol {welcome.version}, this process "
            f"{p.VERSION}: stop it, so that a new one is started"
        )
    return welcome
