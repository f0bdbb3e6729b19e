"""The decode leg: the client's request to an instance, and the answer back, byte by byte.

Decode's status, headers and body are the truth. An answer that has a length is read whole before
the client sees any of it, of a stream the first piece: until then another instance can be asked,
and later one that goes on with the stream. A client that goes away cancels the handler, and with it
the upstream request, so the engine stops.
"""

from __future__ import annotations

import logging
from functools import partial

import aiohttp
from aiohttp import web

from ucm.pd import upstream
from ucm.pd.delivery import Answer, Delivery
from ucm.pd.errors import error_response
from ucm.pd.instances import Instance, NoInstance, Pool, QueueFull
from ucm.pd.journey import Journey
from ucm.pd.promise import Ask, Promise
from ucm.pd.resume import Tracker

logger = logging.getLogger(__name__)

# The instance is well and has no room: another may have.
_TRY_ANOTHER = frozenset({429, 503})
_RETRY_AFTER_S = 1


class Relay:
    """Sends requests to one pool. Owned by the event loop's thread."""

    def __init__(self, session: aiohttp.ClientSession, pool: Pool) -> None:
        self._session = session
        self._pool = pool

    async def answer(
        self,
        request: web.Request,
        body: bytes | None,
        journey: Journey,
        tracker: Tracker | None = None,
        promise: Promise | None = None,
    ) -> web.StreamResponse:
        """The client's response, sent. Never raises but for a client that has left."""
        delivery = Delivery(request, journey, tracker)
        tried: list[Instance] = []
        problem = ""
        while True:
            try:
                with journey.stage("queue"):
                    instance = await self._pool.admit(tokens=journey.tokens, but=tried)
            except NoInstance as error:
                return await _give_up(delivery, journey, 502 if tried else 503, problem or error)
            except QueueFull as error:
                return await _give_up(delivery, journey, 503, error)
            try:
                tried.append(instance)
                ask = partial(self._ask, tried, request, journey)
                found = await _keep(promise, ask, delivery, body)
                if isinstance(found, str):
                    problem = found
                else:
                    async with found.upstream:
                        broken = await delivery.take(found)
                    if broken is None:
                        assert delivery.response is not None
                        return delivery.response
                    problem = broken
                    if not delivery.can_resume:
                        return await _give_up(delivery, journey, 502, problem)
                    logger.warning("%s; another goes on with it", problem)
            finally:
                self._pool.leave(instance, tokens=journey.tokens)
            if self._pool.has_another(tried):
                journey.retried(self._pool.role.value)

    async def _ask(
        self,
        tried: list[Instance],
        request: web.Request,
        journey: Journey,
        body: bytes | None,
        suffix: str,
    ) -> Answer | str:
        """The beginning of the answer of the last of `tried`, or what is wrong with it."""
        instance = tried[-1]
        request_id = journey.request_id + (f"-r{len(tried)}" if len(tried) > 1 else "") + suffix
        headers = upstream.request_headers(request.headers, request_id=request_id)
        url = upstream.target(instance.url, request.raw_path)
        role = self._pool.role.value
        try:
            with journey.stage("decode_ttft"):
                response = await upstream.ask(
                    self._session, request.method, url, body=body, headers=headers
                )
                answer = await _begin(response)
        except upstream.UNREACHABLE as error:
            instance.breaker.failed()
            problem = f"{upstream.failure_reason(error)} ({error})"
            logger.warning("%s %s: %s", role, instance.url, problem)
            return f"the {role} instance at {instance.url}: {problem}"
        instance.breaker.succeeded()
        if response.status in _TRY_ANOTHER and self._pool.has_another(tried):
            response.close()
            return f"the {role} instance at {instance.url} is too busy"
        return answer


async def _keep(
    promise: Promise | None, ask: Ask, delivery: Delivery, body: bytes | None
) -> Answer | str:
    """Who goes on with a stream is asked for more than the promise was about."""
    if promise is None or body is None or delivery.response is not None:
        return await ask(delivery.body(body), "")
    return await promise.keep(ask, body)


async def _begin(response: aiohttp.ClientResponse) -> Answer:
    try:
        if response.content_length is not None:
            return Answer(response, await response.read(), is_whole=True)
        return Answer(response, await response.content.readany(), is_whole=False)
    except BaseException:
        response.close()
        raise


async def _give_up(
    delivery: Delivery, journey: Journey, code: int, problem: str | Exception
) -> web.StreamResponse:
    if delivery.response is not None:
        await delivery.break_off(str(problem))
        return delivery.response
    journey.status = code
    journey.failed("turned_away" if code == 503 else "unreachable")
    response = error_response(code, str(problem))
    response.headers.update(journey.headers())
    if code == 503:
        response.headers["Retry-After"] = str(_RETRY_AFTER_S)
    return response
