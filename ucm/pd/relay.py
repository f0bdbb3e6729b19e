"""One client request: first its prompt to prefill, then its own bytes to decode.

Prefill is a hint: decode can compute anything that the store lacks. So whatever happens there is
logged and forgotten, and decode's status, headers and body are what the client gets, byte by byte.
Decode's status is known before the client sees any header. A client that goes away cancels the
handler, and with it the upstream request, so the engine stops as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from io import BytesIO

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from ucm.pd.rewrite import prefill_body

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
# vLLM's server closes idle connections after 5 s: let go before it does, or a request now and then
# goes out on a connection that is just being closed.
IDLE_CONNECTION_S = 3.0
# A prompt of several images may be large; something has to end one that never ends.
MAX_BODY_BYTES = 512 << 20

# About one connection, not about the message (RFC 9110, 7.6.1).
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# Said anew for each connection.
_REQUEST_ONLY = frozenset({"host", "content-length", "expect"})
_BROKEN_OFF = (
    aiohttp.ClientPayloadError,
    aiohttp.ClientOSError,
    aiohttp.ServerDisconnectedError,
)
_NO_DEFAULTS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")


@dataclass(frozen=True, kw_only=True)
class Instances:
    """The two sides of one deployment."""

    prefill: URL
    decode: URL


def make_app(instances: Instances) -> web.Application:
    """The proxy as an aiohttp application; run it with handler_cancellation=True."""
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app[_INSTANCES] = instances
    app.cleanup_ctx.append(_client_session)
    app.router.add_post("/v1/completions", _prefill_then_decode)
    app.router.add_post("/v1/chat/completions", _prefill_then_decode)
    app.router.add_get("/v1/models", _ask_decode)
    app.router.add_get("/health", _ask_decode)
    app.router.add_get("/healthcheck", _healthcheck)
    return app


_INSTANCES = web.AppKey("instances", Instances)
_SESSION = web.AppKey("session", aiohttp.ClientSession)


async def _client_session(app: web.Application) -> AsyncIterator[None]:
    # No limit and no total timeout: a decode may stream for an hour, and thousands of them at once.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S)
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=_NO_DEFAULTS,
    ) as session:
        app[_SESSION] = session
        yield


async def _prefill_then_decode(request: web.Request) -> web.StreamResponse:
    body = await request.read()
    first = prefill_body(body)
    if first is not None:
        await _prefill(request, first)
    return await _relay(request, body)


async def _ask_decode(request: web.Request) -> web.StreamResponse:
    return await _relay(request, None)


async def _healthcheck(request: web.Request) -> web.Response:
    del request
    return web.json_response({"status": "ok", "prefill_instances": 1, "decode_instances": 1})


async def _prefill(request: web.Request, body: bytes) -> None:
    url = request.app[_INSTANCES].prefill.join(request.rel_url)
    headers = _end_to_end(request.headers, but=_REQUEST_ONLY)
    try:
        async with request.app[_SESSION].post(url, data=BytesIO(body), headers=headers) as response:
            answer = await response.read()
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        logger.warning("prefill %s failed, decode computes the prompt: %r", url, error)
        return
    if response.status >= web.HTTPBadRequest.status_code:
        logger.warning("prefill %s answered %d: %s", url, response.status, answer[:500])


async def _relay(request: web.Request, body: bytes | None) -> web.StreamResponse:
    url = request.app[_INSTANCES].decode.join(request.rel_url)
    headers = _end_to_end(request.headers, but=_REQUEST_ONLY)
    # A file object is sent in pieces; bytes of many MiB at once would hold up every other stream.
    data = None if body is None else BytesIO(body)
    try:
        upstream = await request.app[_SESSION].request(
            request.method, url, data=data, headers=headers, allow_redirects=False
        )
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        logger.warning("decode %s failed: %r", url, error)
        return _bad_gateway(f"the decode instance at {url.origin()} failed to answer: {error}")
    async with upstream:
        response = web.StreamResponse(
            status=upstream.status,
            reason=upstream.reason,
            headers=_end_to_end(upstream.headers, but=frozenset()),
        )
        await response.prepare(request)
        await _copy_body(request, upstream, response)
        return response


async def _copy_body(
    request: web.Request, upstream: aiohttp.ClientResponse, response: web.StreamResponse
) -> None:
    try:
        async for chunk in upstream.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
    except _BROKEN_OFF as error:
        # The status is long out. Ending the connection inside the body is what tells the client
        # that the answer is not whole.
        logger.warning("decode %s broke off its answer: %r", upstream.url, error)
        if request.transport is not None:
            request.transport.close()


def _end_to_end(headers: CIMultiDictProxy[str], *, but: frozenset[str]) -> CIMultiDict[str]:
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    left_out = _HOP_BY_HOP | but | named
    return CIMultiDict((k, v) for k, v in headers.items() if k.lower() not in left_out)


def _bad_gateway(message: str) -> web.Response:
    error = {"message": message, "type": "BadGatewayError", "param": None, "code": 502}
    return web.json_response({"error": error}, status=502)
