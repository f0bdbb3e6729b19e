"""The decode leg: the client's own bytes to an instance, and its answer back, byte by byte.

Decode's status, headers and body are the truth. An answer that has a length is read whole before
the client sees any of it, of a stream the first piece: until then another instance can be asked. A
client that goes away cancels the handler, and with it the upstream request, so the engine stops.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from ucm.pd import upstream
from ucm.pd.instances import Instance, NoInstance, Pool, QueueFull
from ucm.pd.journey import Journey

logger = logging.getLogger(__name__)

_EVENT_STREAM = "text/event-stream"
# The instance is well and has no room: another may have.
_TRY_ANOTHER = frozenset({429, 503})
_RETRY_AFTER_S = 1


@dataclass(frozen=True)
class _Answer:
    """`first` is the whole body, or the first piece of a stream that has more."""

    upstream: aiohttp.ClientResponse
    first: bytes
    is_whole: bool

    @property
    def is_event_stream(self) -> bool:
        return self.upstream.content_type == _EVENT_STREAM


class Relay:
    """Sends requests to one pool. Owned by the event loop's thread."""

    def __init__(self, session: aiohttp.ClientSession, pool: Pool) -> None:
        self._session = session
        self._pool = pool

    async def answer(
        self, request: web.Request, body: bytes | None, journey: Journey
    ) -> web.StreamResponse:
        """The client's response, sent. Never raises but for a client that has left."""
        tried: list[Instance] = []
        problem = ""
        while True:
            try:
                with journey.stage("queue"):
                    instance = await self._pool.admit(tokens=journey.tokens, but=tried)
            except NoInstance as error:
                return _error(journey, 502 if tried else 503, problem or str(error))
            except QueueFull as error:
                return _error(journey, 503, str(error))
            try:
                tried.append(instance)
                found = await self._ask(tried, request, body, journey)
                if isinstance(found, _Answer):
                    async with found.upstream:
                        return await _send(request, found, journey)
            finally:
                self._pool.leave(instance, tokens=journey.tokens)
            problem = found
            if self._pool.has_another(tried):
                journey.retried(self._pool.role.value)

    async def _ask(
        self, tried: list[Instance], request: web.Request, body: bytes | None, journey: Journey
    ) -> _Answer | str:
        """The beginning of the answer of the last of `tried`, or what is wrong with it."""
        instance = tried[-1]
        request_id = journey.request_id + (f"-r{len(tried)}" if len(tried) > 1 else "")
        headers = upstream.request_headers(request.headers, request_id=request_id)
        url = instance.url.join(URL(request.raw_path, encoded=True))
        try:
            with journey.stage("decode_ttft"):
                response = await upstream.ask(
                    self._session, request.method, url, body=body, headers=headers
                )
                answer = await _begin(response)
        except upstream.UNREACHABLE as error:
            instance.breaker.failed()
            problem = f"{upstream.failure_reason(error)} ({error})"
            logger.warning("%s %s: %s", self._pool.role.value, instance.url, problem)
            return f"the {self._pool.role.value} instance at {instance.url}: {problem}"
        instance.breaker.succeeded()
        if response.status in _TRY_ANOTHER and self._pool.has_another(tried):
            response.close()
            return f"the {self._pool.role.value} instance at {instance.url} is too busy"
        return answer


async def _begin(response: aiohttp.ClientResponse) -> _Answer:
    try:
        if response.content_length is not None:
            return _Answer(response, await response.read(), is_whole=True)
        return _Answer(response, await response.content.readany(), is_whole=False)
    except BaseException:
        response.close()
        raise


async def _send(request: web.Request, answer: _Answer, journey: Journey) -> web.StreamResponse:
    headers = upstream.response_headers(answer.upstream.headers)
    headers.update(journey.headers())
    status, reason = answer.upstream.status, answer.upstream.reason
    journey.status = status
    if answer.is_whole:
        return web.Response(status=status, reason=reason, headers=headers, body=answer.first)
    response = web.StreamResponse(status=status, reason=reason, headers=headers)
    await response.prepare(request)
    await response.write(answer.first)
    try:
        async for piece in answer.upstream.content.iter_any():
            await response.write(piece)
    except upstream.UNREACHABLE as error:
        await _break_off(request, response, answer, error, journey)
        return response
    await response.write_eof()
    return response


async def _break_off(
    request: web.Request,
    response: web.StreamResponse,
    answer: _Answer,
    error: BaseException,
    journey: Journey,
) -> None:
    """The status is long out: an error event says that the answer is not whole; where there are no
    events, the connection ends inside the body."""
    if request.transport is None or request.transport.is_closing():
        return  # it is the client that has gone
    logger.warning("%s broke off its answer: %r", answer.upstream.url, error)
    journey.failed("broken_off")
    if answer.is_event_stream:
        text = f"the instance at {answer.upstream.url.origin()} broke off its answer: {error!r}"
        # It may have stopped inside an event.
        await response.write(b"\n\ndata: " + error_body(502, text) + b"\n\n")
        await response.write_eof()
    else:
        request.transport.close()


def error_body(code: int, message: str) -> bytes:
    """As OpenAI's API has it."""
    kinds = {400: "BadRequestError", 403: "PermissionDeniedError", 404: "NotFoundError"}
    kind = kinds.get(code, "ServiceUnavailableError" if code == 503 else "BadGatewayError")
    error = {"message": message, "type": kind, "param": None, "code": code}
    return msgspec.json.encode({"error": error})


def error_response(code: int, message: str, **headers: str) -> web.Response:
    return web.Response(
        status=code,
        body=error_body(code, message),
        content_type="application/json",
        headers=headers,
    )


def _error(journey: Journey, code: int, message: str) -> web.Response:
    journey.status = code
    journey.failed("turned_away" if code == 503 else "unreachable")
    response = error_response(code, message)
    response.headers.update(journey.headers())
    if code == 503:
        response.headers["Retry-After"] = str(_RETRY_AFTER_S)
    return response
