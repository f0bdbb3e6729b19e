"""WebSockets, passed through to one instance, message by message, both ways.

Another instance is asked as long as none has said yes. From then on each side gets the other's
messages, pings and end as they come, and whoever goes takes the other along. So do both when no
message has got through for a while: whose peer has vanished without a word hears of it by nothing
else. One message of each way is in memory at a time, and what the sockets have read ahead.
"""

from __future__ import annotations

import asyncio
import logging
import time

import aiohttp
from aiohttp import web
from multidict import CIMultiDict

from ucm.pd.errors import error_response
from ucm.pd.fleet.instance import Instance, Role
from ucm.pd.fleet.pool import NoInstance, Pool, QueueFull
from ucm.pd.fleet.silence import unless_lost
from ucm.pd.legs import upstream, verdict
from ucm.pd.legs.verdict import Verdict
from ucm.pd.stopping import go_on
from ucm.pd.trace import RequestTrace

logger = logging.getLogger(__name__)

# vLLM's server takes 16 MiB.
MAX_MESSAGE_BYTES = 64 << 20
_HANDSHAKE_S = 30.0
_CLOSING_S = 5.0
_PROTOCOL = "Sec-WebSocket-Protocol"
_Socket = aiohttp.ClientWebSocketResponse | web.WebSocketResponse


def wants_websocket(request: web.Request) -> bool:
    return request.method == "GET" and request.headers.get("Upgrade", "").lower() == "websocket"


async def pass_through(
    client: upstream.Client,
    pool: Pool,
    request: web.Request,
    trace: RequestTrace,
    *,
    idle_timeout_s: float,
) -> web.StreamResponse:
    if pool.role is Role.DECODE:
        trace.not_prefilled("websocket")
    tried: list[Instance] = []
    problem: tuple[int, str] | None = None
    while True:
        try:
            instance = await pool.admit(tokens=0, but=tried, kind=trace.kind)
        except (NoInstance, QueueFull) as error:
            return _refused(trace, *(problem or (503, str(error))))
        tried.append(instance)
        try:
            found = await _connect(client, instance, request, trace)
            if isinstance(found, aiohttp.ClientWebSocketResponse):
                async with found:
                    return await _joined(found, request, trace, idle_timeout_s)
            status, text, is_final = found
            problem = problem or (status, text)
            if is_final:
                return _refused(trace, *problem)
        finally:
            pool.leave(instance, tokens=0)
        if pool.has_another(tried):
            trace.retried(pool.role.value)


async def _connect(
    client: upstream.Client, instance: Instance, request: web.Request, trace: RequestTrace
) -> aiohttp.ClientWebSocketResponse | tuple[int, str, bool]:
    """The open socket; or status and text for the client, and whether nobody else is asked."""
    where = f"the {instance.role.value} instance at {instance.url}"
    connecting = client.fresh.ws_connect(
        upstream.target(instance.url, request.raw_path),
        headers=_headers(client, instance, request, trace),
        protocols=_protocols(request),
        autoping=False,
        ssl=client.tls.now,
        max_msg_size=MAX_MESSAGE_BYTES,
        timeout=aiohttp.ClientWSTimeout(ws_close=_CLOSING_S),
    )
    try:
        found = await unless_lost(instance, asyncio.wait_for(connecting, _HANDSHAKE_S))
    except aiohttp.WSServerHandshakeError as error:
        instance.heard()
        what = verdict.of_status(error.status)
        if what is Verdict.FAILED:
            instance.failed()
        text = f"{where} answered {error.status}"
        return max(error.status, 400), text, what is Verdict.NO_WORD
    except upstream.UNREACHABLE as error:
        reason = upstream.failure_reason(error)
        logger.warning("%s: %s (%s)", where, reason, error)
        if reason == upstream.OUT_OF_SOCKETS:
            return 503, f"the proxy has no file descriptor or port left: {error}", True
        if reason != "timeout":
            instance.failed()
        return 502, f"{where}: {reason} ({error})", False
    instance.heard()
    instance.succeeded()
    return found


class _Idle:
    """Since when no message has got through, either way. Pings are none: they say that somebody
    lives, and vLLM sends them whether anybody listens or not."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._since_s = time.monotonic()

    def ends(self) -> None:
        self._since_s = time.monotonic()

    async def is_over(self) -> None:
        """Returns when it has been so for too long."""
        left_s = self.limit_s
        while left_s > 0:
            await asyncio.sleep(left_s)
            left_s = self._since_s + self.limit_s - time.monotonic()


async def _joined(
    engine: aiohttp.ClientWebSocketResponse,
    request: web.Request,
    trace: RequestTrace,
    idle_timeout_s: float,
) -> web.StreamResponse:
    chosen = (engine.protocol,) if engine.protocol else ()
    client = web.WebSocketResponse(
        autoping=False, max_msg_size=MAX_MESSAGE_BYTES, protocols=chosen, timeout=_CLOSING_S
    )
    client.headers.update(trace.headers())
    await client.prepare(request)
    trace.status = 101
    idle = _Idle(idle_timeout_s)
    doing = (_pump(client, engine, idle), _pump(engine, client, idle), idle.is_over())
    tasks = [asyncio.create_task(each) for each in doing]
    why = None
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[-1].done():
            trace.failed("timeout")
            why = f"nothing came for --websocket-idle-timeout-s, {idle.limit_s:g} s"
    except asyncio.CancelledError:
        if not go_on(trace):
            raise
        trace.failed("stopping")
        why = "the proxy is stopping"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    if why is not None:
        # That the client goes then is no other failure.
        trace.is_delivered = True
        # At once: neither has to wait for what the other says to it.
        has_ended, _ = await asyncio.gather(_end(client, why), _end(engine, why))
        if not has_ended and request.transport is not None:
            request.transport.abort()
    return client


async def _end(socket: _Socket, why: str) -> bool:
    """Whether it has. One that takes nothing any more takes no goodbye either, and one that doesn't
    stop to send hides its own."""
    closing = socket.close(code=aiohttp.WSCloseCode.GOING_AWAY, message=why.encode())
    try:
        await asyncio.wait_for(closing, _CLOSING_S)
    except (ConnectionError, asyncio.TimeoutError):
        return False
    return True


async def _pump(source: _Socket, target: _Socket, idle: _Idle) -> None:
    """Until the source has ended, or nobody takes it any more."""
    try:
        while True:
            message = await source.receive()
            if message.type is aiohttp.WSMsgType.TEXT:
                await target.send_str(message.data)
                idle.ends()
            elif message.type is aiohttp.WSMsgType.BINARY:
                await target.send_bytes(message.data)
                idle.ends()
            elif message.type is aiohttp.WSMsgType.PING:
                await target.ping(message.data)
            elif message.type is aiohttp.WSMsgType.PONG:
                await target.pong(message.data)
            else:
                break
        await target.close(code=_code_for(source.close_code), message=_reason(message))
    except ConnectionError:
        return  # the target's own pump finds out


def _code_for(code: int | None) -> int:
    """What may be sent; a connection that ended without a word has no code of its own."""
    if code is None or code == aiohttp.WSCloseCode.ABNORMAL_CLOSURE:
        return aiohttp.WSCloseCode.INTERNAL_ERROR
    return max(code, aiohttp.WSCloseCode.OK)


def _reason(message: aiohttp.WSMessage) -> bytes:
    return message.extra.encode() if isinstance(message.extra, str) else b""


def _headers(
    client: upstream.Client, instance: Instance, request: web.Request, trace: RequestTrace
) -> CIMultiDict[str]:
    """Those of the handshake are made anew."""
    headers = client.headers(request.headers, instance.role, request_id=trace.request_id)
    for name in [name for name in headers if name.lower().startswith("sec-websocket-")]:
        headers.popall(name, None)
    return headers


def _protocols(request: web.Request) -> list[str]:
    named = ",".join(request.headers.getall(_PROTOCOL, [])).split(",")
    return [name.strip() for name in named if name.strip()]


def _refused(trace: RequestTrace, code: int, text: str) -> web.Response:
    trace.status = code
    trace.failed("turned_away" if code == 503 else "unreachable")
    response = error_response(code, text)
    response.headers.update(trace.headers())
    return response
