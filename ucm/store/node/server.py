"""The node cache process: one event loop for all decisions, bounded threads for all I/O.

The socket is private to one user (mode 0600 in a directory of 0700, and the peer's uid is checked).
A lock file beside it makes the process the only one; whoever holds the lock owns the socket's
name. The process leaves on SIGTERM or when it has been idle for a while, after writing out what
is queued, within a bound.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import socket
import struct
import time
import uuid
from functools import partial
from pathlib import Path
from typing import cast

from ucm.config import StoreSettings
from ucm.errors import NodeUnavailable, ProtocolError
from ucm.store.node import protocol as p
from ucm.store.node.core import NodeCore
from ucm.store.node.io import IoPool
from ucm.store.node.memory import SharedMemory, default_capacity_bytes
from ucm.store.node.state import Connection
from ucm.store.pipeline import build_tier
from ucm.store.slots import SlotTable

logger = logging.getLogger(__name__)

_TICK_S = 0.05
_DRAIN_S = 30.0
_MAX_UNSENT_BYTES = 64 << 20
_GIB = 1 << 30


class NodeServer:
    """Owns the memory, the tier, the threads and the listening socket of one node cache."""

    def __init__(self, settings: StoreSettings, loop: asyncio.AbstractEventLoop) -> None:
        self._settings = settings
        self._loop = loop
        capacity_bytes = settings.cache_capacity_bytes or default_capacity_bytes()
        slots = SlotTable(capacity_bytes)
        self.memory = SharedMemory(slots.capacity_bytes)
        self.tier = build_tier(settings)
        timeout_s = settings.io_timeout_ms / 1000
        self._reads = IoPool(
            "read", loop=loop, num_threads=settings.read_threads, timeout_s=timeout_s
        )
        self._writes = IoPool(
            "write", loop=loop, num_threads=settings.write_threads, timeout_s=timeout_s
        )
        self._populate = IoPool("populate", loop=loop, num_threads=1, timeout_s=timeout_s)
        self.core = NodeCore(
            slots=slots,
            tier=self.tier,
            reads=self._reads,
            writes=self._writes,
            page_of=lambda slot: self.memory.page(slot.offset, slot.span.slot_bytes),
            populate=self._populate_span,
            max_write_pages=settings.write_queue_pages,
            clock=time.monotonic,
        )
        self.arena = uuid.uuid4().hex
        self.num_connections = 0
        self.leaving = asyncio.Event()
        logger.info(
            "memory for slots: %.2f GiB (%s)",
            slots.capacity_bytes / _GIB,
            "cache_buffer_capacity_gb"
            if settings.cache_capacity_bytes
            else "a quarter of what is available; set cache_buffer_capacity_gb to choose",
        )

    def _populate_span(self, offset: int, nbytes: int) -> None:
        self._populate.submit(lambda: self.memory.populate(offset, nbytes), lambda _: None)

    async def serve(self, listener: socket.socket) -> None:
        """Serves until told to leave or idle. Writes that are queued then are finished, bounded."""
        accepting = asyncio.create_task(self._accept(listener))
        idle_since_s = time.monotonic()
        while not self.leaving.is_set():
            await asyncio.sleep(_TICK_S)
            self.core.tick()
            if self.num_connections or any(self.core.queues().values()):
                idle_since_s = time.monotonic()
            if time.monotonic() - idle_since_s > self._settings.idle_exit_s:
                logger.info("idle for %g s: leaving", self._settings.idle_exit_s)
                break
        accepting.cancel()
        listener.close()
        await self._drain()

    async def _drain(self) -> None:
        deadline_s = time.monotonic() + _DRAIN_S
        while self.core.queues()["write_pages"] or self._writes.depth:
            self.core.tick()
            if time.monotonic() > deadline_s or self._writes.stalled:
                logger.warning(
                    "leaving with %d pages unwritten: storage is too slow",
                    self.core.queues()["write_pages"],
                )
                return
            await asyncio.sleep(_TICK_S / 5)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = await self._loop.sock_accept(listener)
            uid = _peer_uid(sock)
            if uid not in (0, os.getuid()):
                logger.warning("refused a connection from uid %d", uid)
                sock.close()
                continue
            await self._loop.connect_accepted_socket(partial(_Peer, self, sock), sock)


class _Peer(asyncio.Protocol):
    """One client's socket."""

    def __init__(self, server: NodeServer, sock: socket.socket) -> None:
        self._server = server
        self._sock = sock
        self._frames = p.FrameBuffer()
        self._connection: Connection | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.num_connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.num_connections -= 1
        if self._connection is not None:
            self._server.core.closed(self._connection)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self._handle(p.decode_client(body))
        except ProtocolError as error:
            logger.warning("dropped a client: %s", error)
            self._close()

    def _handle(self, message: p.ClientMessage) -> None:
        server = self._server
        if isinstance(message, p.Hello):
            self._welcome(message)
        elif self._connection is None:
            raise ProtocolError(f"{type(message).__name__} before Hello")
        elif isinstance(message, p.GetStatus):
            self._send(server.core.status(message.id, pid=os.getpid(), arena=server.arena))
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
            extent_bytes=server.core.slots.extent_bytes,
            pid=os.getpid(),
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

    def _send(self, message: p.NodeMessage) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        transport.write(p.encode(message))
        if transport.get_write_buffer_size() > _MAX_UNSENT_BYTES:
            logger.warning("dropped a client that does not read its answers")
            self._close()

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _peer_uid(sock: socket.socket) -> int:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)


class SocketLock:
    """The right to serve at a socket path; held while the object lives, lost with the process."""

    def __init__(self, socket_path: str) -> None:
        """Raises NodeUnavailable when another process holds it."""
        self.path = Path(socket_path)
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
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


def run(settings: StoreSettings) -> None:
    """Serves at `settings.socket_path` until SIGTERM, SIGINT, Shutdown, or idle for long.

    Raises NodeUnavailable when another node cache serves there, ConfigError for settings that
    can't work on this machine.
    """
    lock = SocketLock(settings.socket_path)
    try:
        asyncio.run(_run(settings, lock))
    finally:
        lock.release()


async def _run(settings: StoreSettings, lock: SocketLock) -> None:
    loop = asyncio.get_running_loop()
    server = NodeServer(settings, loop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.leaving.set)
    listener = lock.listen()
    logger.info("node cache %d serves at %s", os.getpid(), settings.socket_path)
    await server.serve(listener)
    logger.info("node cache %d leaves; %s", os.getpid(), dict(server.core.counters))
