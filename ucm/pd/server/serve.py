"""The proxy as a server: sockets, limits on headers, errors of its own, and its end by a signal.

The first SIGTERM or SIGINT closes the sockets and lets what runs go on for a while; a second one
ends that while. What the HTTP library says by itself is said in the words of OpenAI's API.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from aiohttp import web

from ucm.errors import ConfigError
from ucm.pd.app import STOPPING, make_app
from ucm.pd.errors import error_response
from ucm.pd.flags import ProxySettings
from ucm.pd.legs.upstream import MAX_HEADER_BYTES
from ucm.pd.security import followed, tls
from ucm.pd.server.connections import MOST_CONNECTIONS, Connections, default_limit
from ucm.pd.server.listening import Site, bound, raise_descriptor_limit

logger = logging.getLogger(__name__)

# Each request has a line of its own already.
_NO_ACCESS_LOG = logging.getLogger(f"{__name__}.access")
_NO_ACCESS_LOG.disabled = True
# For the last words of those that the end has interrupted, and then for their connections.
_LAST_WORDS_S = 2.0
_CLOSING_S = 1.0
_Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


async def serve(settings: ProxySettings) -> None:
    """Until SIGINT or SIGTERM. Raises ConfigError when it can't listen there."""
    raise_descriptor_limit()
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    app = make_app(settings)
    own = tls.of_the_proxy(settings.ssl_certfile, settings.ssl_keyfile)
    runner = Runner(app, max_connections=settings.max_connections or default_limit())
    await runner.setup()
    renewing = followed.start(own.following())
    try:
        await _listen(runner, settings.host, settings.port, own.now)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, signals.put_nowait, number)
        scheme = "https" if own.now else "http"
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        logger.info("listening on %s://%s:%d", scheme, host, settings.port)
        logger.info("stopping: %s", signal.Signals(await signals.get()).name)
        await _drain(runner, app, signals, timeout_s=settings.shutdown_timeout_s)
    finally:
        for task in renewing:
            task.cancel()
        await runner.cleanup()


class Runner(web.AppRunner):
    """Also for tests that serve the proxy in their own process."""

    def __init__(self, app: web.Application, *, max_connections: int = MOST_CONNECTIONS) -> None:
        super().__init__(app, shutdown_timeout=_CLOSING_S)
        self.connections = Connections(max_connections)

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _HttpServer(
            self.connections,
            partial(self._answer, made.request_handler),
            request_factory=made.request_factory,
            # A client that leaves cancels both legs.
            handler_cancellation=True,
        )

    async def _answer(self, handler: _Handler, request: web.BaseRequest) -> web.StreamResponse:
        """What `handler` answers, or what the HTTP library refuses before it asks our code."""
        self.connections.asks(request.protocol)
        try:
            return await handler(request)
        except web.HTTPNotFound:
            return error_response(404, f"{request.raw_path!r} is no path: they begin with /")
        except web.HTTPException as error:
            return error_response(error.status, error.text or error.reason, path=request.path)


class _HttpServer(web.Server):
    def __init__(self, connections: Connections, handler: _Handler, **given: Any) -> None:
        super().__init__(handler, **given)
        self._of_clients = connections

    def __call__(self) -> web.RequestHandler:
        return _ClientConnection(
            self._of_clients,
            self,
            loop=asyncio.get_running_loop(),
            access_log=_NO_ACCESS_LOG,
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
        )


class _ClientConnection(web.RequestHandler):
    __slots__ = ("_of_clients",)

    def __init__(self, connections: Connections, server: web.Server, **given: Any) -> None:
        super().__init__(server, **given)
        self._of_clients = connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._of_clients.opened(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._of_clients.lost(self)
        super().connection_lost(exc)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._of_clients.is_answered(self)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What could not be read as HTTP, and what was not foreseen."""
        if status >= 500:
            logger.error("a request from %s has failed", request.remote, exc_info=exc)
            message = "the proxy has failed; its log says how"
        else:
            logger.info("a request from %s is refused: %s", request.remote, message)
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun, and can't become another one")
        response = error_response(status, " ".join((message or "the request is wrong").split()))
        response.force_close()
        return response


async def _listen(runner: Runner, host: str, port: int, context: ssl.SSLContext | None) -> None:
    try:
        await Site(runner, runner.connections, await bound(host, port), context).start()
    except socket.gaierror as error:
        problem = f"--host: {host!r} is no address of this machine: {error.strerror}"
        raise ConfigError(problem) from error
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"can't listen on --host {host} --port {port}: {reason}") from error


async def _drain(
    runner: Runner, app: web.Application, signals: asyncio.Queue[int], *, timeout_s: float
) -> None:
    stopping = app[STOPPING]
    stopping.has_begun = True
    for site in runner.sites:
        await site.stop()
    drained = asyncio.create_task(stopping.drained())
    again = asyncio.create_task(signals.get())
    waited: set[asyncio.Task[Any]] = {drained, again}
    await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    again.cancel()
    if not drained.done():
        stopping.tell_all()
        await asyncio.wait({drained}, timeout=_LAST_WORDS_S)
    drained.cancel()
    await asyncio.wait(waited)
