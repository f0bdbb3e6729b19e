"""The proxy's listening sockets, and what becomes of them when file descriptors run out.

The event loop's own server answers a lack of descriptors by as many attempts, and as many lines in
the log, as its backlog is long, over and over. Here there is one attempt, a pause, and a line now
and then: clients wait in the backlog until a descriptor is free.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import ssl
import time

from aiohttp import web

from ucm.pd.server.connections import Connections

logger = logging.getLogger(__name__)

_BACKLOG = 1024
_PAUSE_S = 0.5
_SAID_EVERY_S = 10.0
# Of TLS. Who only connects holds a place meanwhile that nobody else can have.
HANDSHAKE_S = 10.0


def raise_descriptor_limit() -> None:
    """A connection is a descriptor, and each request has up to three: as many as we may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        # macOS has "unlimited" for a limit that it doesn't take.
        logger.info("the limit of file descriptors stays at %d: %s", soft, error)


class Site(web.BaseSite):
    """Accepts on sockets that are bound, as long as there is room for connections. Closes the
    sockets when it stops; connections go on."""

    def __init__(
        self,
        runner: web.AppRunner,
        connections: Connections,
        sockets: list[socket.socket],
        context: ssl.SSLContext | None,
    ) -> None:
        super().__init__(runner, ssl_context=context)
        server = runner.server
        assert server is not None, "a site comes after the runner's setup"
        self._make_protocol = server
        self._connections = connections
        self._context = context
        self._sockets = sockets
        self._accepting: list[asyncio.Task[None]] = []
        self._beginning: set[asyncio.Task[None]] = set()
        self._said_s: float | None = None

    @property
    def name(self) -> str:
        return ", ".join(str(each.getsockname()) for each in self._sockets)

    async def start(self) -> None:
        await super().start()
        for each in self._sockets:
            each.setblocking(False)
            each.listen(_BACKLOG)
        self._accepting = [asyncio.create_task(self._accept(each)) for each in self._sockets]

    async def stop(self) -> None:
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        for each in self._sockets:
            each.close()
        await super().stop()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except ConnectionError:
                continue  # a client that is gone already
            except OSError as error:
                self._say(error)
                await asyncio.sleep(_PAUSE_S)
                continue
            try:
                await self._connections.room()
            except asyncio.CancelledError:
                accepted.close()
                raise
            task = asyncio.create_task(self._begin(accepted))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)

    async def _begin(self, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                self._make_protocol,
                accepted,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_S if self._context else None,
            )
        except OSError as error:
            # No handshake of TLS, or gone.
            logger.debug("a connection has ended before it began: %s", error)
        finally:
            self._connections.began()

    def _say(self, error: OSError) -> None:
        now_s = time.monotonic()
        if self._said_s is None or now_s - self._said_s >= _SAID_EVERY_S:
            self._said_s = now_s
            logger.warning("can't accept a connection, clients wait: %s", error)


async def bound(host: str, port: int) -> list[socket.socket]:
    """One socket for each address of the host. Raises OSError."""
    if host == "::" and socket.has_dualstack_ipv6():
        # Alone it would be IPv6 only, which nobody means who writes it.
        return [socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)]
    loop = asyncio.get_running_loop()
    server = await loop.create_server(asyncio.Protocol, host, port, start_serving=False)
    try:
        return [socket.fromfd(each.fileno(), each.family, each.type) for each in server.sockets]
    finally:
        server.close()
