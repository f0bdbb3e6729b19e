"""Who comes in by a node cache's socket, what is heard from them, and when they have really gone.

A client that sends nonsense, or reads nothing, is dropped: nothing it says counts any more, and it
hears nothing more. It has not gone, though: it maps the memory, and may copy until it knows. So
its slots are given back when its own end of the socket has closed, not when ours has.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
from contextlib import suppress
from typing import Protocol, cast

import msgspec

from ucm.config.settings import StoreSettings
from ucm.errors import ProtocolError
from ucm.store.node import protocol as p
from ucm.store.node.core import NodeCore
from ucm.store.node.lock import SocketLock
from ucm.store.node.memory import SharedMemory
from ucm.store.node.sessions import Connection
from ucm.store.node.trusted_users import Trust, peer_of

logger = logging.getLogger(__name__)

_PAUSE_S = 0.05


class Server(Protocol):
    """Of a `NodeServer`, what those who come in have to do with."""

    settings: StoreSettings
    trust: Trust
    core: NodeCore
    memory: SharedMemory
    arena: str
    num_connections: int
    num_peers: int
    dropped: set[Peer]
    leaving: asyncio.Event

    def status(self, request_id: int, *, check: bool) -> p.Status: ...


class Door:
    """The listening socket, and who comes in by it."""

    def __init__(self, server: Server, lock: SocketLock) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._listener = lock.listen()
        self._accepting = asyncio.create_task(self._accept(self._listener))

    async def close(self) -> None:
        """No new clients. Those that are in stay."""
        self._accepting.cancel()
        with suppress(asyncio.CancelledError):
            await self._accepting
        self._listener.close()

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            await self._accept_one(listener)

    async def _accept_one(self, listener: socket.socket) -> None:
        try:
            sock, _ = await self._loop.sock_accept(listener)
            who = peer_of(sock)
            if not self._server.trust.peer(who):
                self._server.core.notices.warn(
                    "refused_a_connection", f"from uid {who.uid}, pid {who.pid}"
                )
                sock.close()
                return
            if self._server.num_peers >= self._server.settings.max_clients:
                why = f"there are {self._server.num_peers} clients (node_cache_max_clients)"
                self._server.core.notices.warn("refused_a_connection", why)
                with suppress(OSError):
                    # A new socket's buffer takes all of it.
                    sock.send(p.encode(p.Notice(text=why)))
                sock.close()
                return
            peer = Peer(self._server, sock)
            await self._loop.connect_accepted_socket(lambda: peer, sock)
        except OSError as error:
            # Out of descriptors, or a client that is gone already. Going on is better than serving
            # nobody new, and not at once: the reason may last.
            self._server.core.notices.warn("could_not_accept_a_connection", error)
            await asyncio.sleep(_PAUSE_S)


class Peer(asyncio.Protocol):
    """One client's socket. A client that is dropped is told by the end of what it hears; its
    connection counts until its own end has closed (`has_hung_up`), for it may still copy."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        self._frames = p.FrameBuffer()
        self._connection: Connection | None = None
        self._transport: asyncio.Transport | None = None
        # Nothing it says counts any more.
        self._is_gone = False
        self._dropped: socket.socket | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.num_peers += 1
        timeout_s = self._server.settings.hello_timeout_ms / 1000
        asyncio.get_running_loop().call_later(timeout_s, self._expect_hello)

    def _expect_hello(self) -> None:
        if self._connection is None and not self._is_gone:
            self._drop("it does not say who it is (node_cache_hello_timeout_ms)")

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.num_peers -= 1
        self._is_gone = True
        if self._connection is not None and self._dropped is None:
            self._server.num_connections -= 1
            self._server.core.closed(self._connection)

    def data_received(self, data: bytes) -> None:
        if self._is_gone:
            return
        try:
            for body in self._frames.feed(data):
                self._handle(p.decode_client(body))
        except ProtocolError as error:
            self._drop(str(error))
        except Exception:
            logger.exception("a bug in what answers a client")
            self._drop("its message met a bug")

    def _handle(self, message: p.ClientMessage) -> None:
        server = self._server
        if self._is_gone:
            return
        if isinstance(message, p.Hello):
            self._welcome(message)
        elif self._connection is None:
            raise ProtocolError(f"{type(message).__name__} before Hello")
        elif isinstance(message, p.GetStatus):
            self._send(server.status(message.id, check=message.check))
        elif isinstance(message, p.Shutdown):
            server.leaving.set()
        else:
            server.core.handle(self._connection, message)

    def _welcome(self, hello: p.Hello) -> None:
        if self._connection is not None:
            raise ProtocolError("a second Hello")
        server = self._server
        welcome = p.Welcome(
            version=p.VERSION,
            arena=server.arena,
            capacity_bytes=server.core.slots.capacity_bytes,
            pid=os.getpid(),
            settings=msgspec.to_builtins(server.settings),
        )
        try:
            # Past the transport: it can't pass descriptors. Nothing was sent before, so the buffer
            # of the socket is empty and takes the whole message.
            socket.send_fds(self._sock, [p.encode(welcome)], [server.memory.fd])
        except OSError as error:
            raise ProtocolError(f"could not pass the memory to a client: {error}") from error
        if hello.version != p.VERSION:
            raise ProtocolError(
                f"a client (pid {hello.pid}) speaks protocol {hello.version}, not {p.VERSION}"
            )
        self._connection = server.core.connect(hello, self._send)
        server.num_connections += 1

    def _send(self, message: p.NodeMessage) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(p.encode(message))
        if transport.get_write_buffer_size() > p.MAX_UNSENT_BYTES:
            self._drop("it does not read its answers")

    def _drop(self, why: str) -> None:
        if self._is_gone:
            return
        self._is_gone = True
        self._server.core.notices.warn("dropped_a_client", f"pid {peer_of(self._sock).pid}: {why}")
        self._server.core.count("clients_dropped")
        if self._connection is not None:
            self._dropped = self._sock.dup()
            self._server.num_connections -= 1
            self._server.dropped.add(self)
            self._server.core.dropped(self._connection)
            with suppress(OSError):
                self._dropped.shutdown(socket.SHUT_WR)
        if self._transport is not None:
            self._transport.abort()

    def has_hung_up(self) -> bool:
        """Whether a dropped client has closed its end, so that its slots are free."""
        assert self._dropped is not None and self._connection is not None
        poller = select.poll()
        poller.register(self._dropped, select.POLLRDHUP | select.POLLHUP)
        if not poller.poll(0):
            return False
        self._dropped.close()
        self._server.core.closed(self._connection)
        return True
