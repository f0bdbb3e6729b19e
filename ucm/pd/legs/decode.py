"""The decode leg: the client's request to an instance, and the answer back, byte by byte.

Decode's status, headers and body are the truth. Until the client sees any of it another instance
can be asked, and later one that goes on with the stream. A client that goes away cancels the
handler, and with it the upstream request, so the engine stops.

One that can't be reached is passed over, and one that is busy, as long as there are others. After
an error that may be the instance's own, or its silence, one other is asked, and the client gets the
better of both answers.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from functools import partial

from aiohttp import web

from ucm.pd.fleet.instance import Instance
from ucm.pd.fleet.pool import NoInstance, Pool, QueueFull
from ucm.pd.fleet.silence import InstanceSilent, Scout
from ucm.pd.legs import bodies, upstream, verdict
from ucm.pd.legs.asking import Asker, judged
from ucm.pd.legs.delivery import Answer, Delivery, Problem, give_up
from ucm.pd.legs.keepers import Keepers, Name
from ucm.pd.legs.kept import KeptRelay
from ucm.pd.legs.prefill_promise import Ask, PrefillPromise
from ucm.pd.legs.resume import Tracker
from ucm.pd.legs.usage import Asking, FoundCached, PrefillUsage
from ucm.pd.legs.verdict import Verdict
from ucm.pd.protocol import RESPONSES
from ucm.pd.stopping import go_on
from ucm.pd.trace import RequestTrace

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Tries:
    """Whom one request has asked. `held` is the first answer that another one was to better."""

    instances: list[Instance] = field(default_factory=list)
    held: Answer | None = None
    held_verdict: Verdict = Verdict.NO_WORD
    # Only what an engine has to compute has one.
    scout: Scout | None = None
    # After an error or silence one other instance is asked, and no third one.
    has_doubted: bool = False

    def hold(self, answer: Answer, what: Verdict) -> None:
        if self.held is None:
            self.held, self.held_verdict = answer, what
        else:
            answer.close()

    def better(self, answer: Answer, *, method: str, kind: str) -> Answer:
        """What the client gets. Says of an instance that alone lacks something that it does."""
        held, self.held = self.held, None
        if held is None:
            return answer
        if not verdict.of_status(answer.upstream.status, method=method).is_settled:
            answer.close()
            return held
        held.close()
        if self.held_verdict is Verdict.DOUBTED and kind:
            self.instances[0].lacks(kind)
        return answer

    def close(self) -> None:
        if self.held is not None:
            self.held.close()
        if self.scout is not None:
            self.scout.close()


class Relay:
    """Sends requests to one pool. Owned by the event loop's thread."""

    def __init__(
        self,
        asker: Asker,
        pool: Pool,
        keepers: Keepers,
        *,
        max_searched: int,
    ) -> None:
        self._asker = asker
        self._pool = pool
        self._keepers = keepers
        self._kept = KeptRelay(asker, pool, keepers, max_searched=max_searched)

    async def answer(
        self,
        request: web.Request,
        body: bytes | None,
        trace: RequestTrace,
        tracker: Tracker | None = None,
        promise: PrefillPromise | None = None,
        name: Name | None = None,
    ) -> web.StreamResponse:
        """The client's response, sent; with a `name` by who keeps what it names. Never raises but
        for a client that has left."""
        found = self._found(request, promise, name)
        delivery = Delivery(request, trace, tracker, PrefillUsage(found) if found else None)
        tries = _Tries()
        tries.scout = self._scout(request, trace, tries)
        try:
            if name is not None:
                return await self._kept.answer(delivery, body, trace, name)
            return await self._answer(delivery, request, body, trace, promise, tries)
        except asyncio.CancelledError:
            response = delivery.response
            if response is None or not response.prepared or not go_on(trace):
                raise
            await delivery.break_off("the proxy is stopping", code=503)
            trace.failed("stopping")
            return response
        finally:
            tries.close()

    async def _answer(
        self,
        delivery: Delivery,
        request: web.Request,
        body: bytes | None,
        trace: RequestTrace,
        promise: PrefillPromise | None,
        tries: _Tries,
    ) -> web.StreamResponse:
        problem = Problem("", code=502)
        while True:
            try:
                with trace.stage("queue"):
                    instance = await self._pool.admit(
                        tokens=trace.tokens,
                        but=tries.instances,
                        kind=trace.kind,
                        prefix=trace.prefix,
                    )
            except (NoInstance, QueueFull) as error:
                if tries.held is not None:
                    await delivery.take(tries.held)
                    assert delivery.response is not None
                    return delivery.response
                is_first = not tries.instances or isinstance(error, QueueFull)
                problem = Problem(str(error), code=503) if is_first else problem
                return await give_up(delivery, trace, problem)
            try:
                tries.instances.append(instance)
                ask = partial(self._ask, tries, request, trace, delivery)
                found = await _keep(promise, ask, delivery, body)
                if isinstance(found, Answer):
                    answer = tries.better(found, method=request.method, kind=trace.kind)
                    answer = await self._noted(answer, request, instance, promise)
                    async with answer.upstream:
                        broken = await delivery.take(answer)
                    if broken is None:
                        assert delivery.response is not None
                        return delivery.response
                    found = Problem(broken, code=502, is_final=not delivery.can_resume)
                    if delivery.can_resume:
                        logger.warning("%s; another goes on with it", broken)
                problem = found
                if problem.is_final:
                    return await give_up(delivery, trace, problem)
            finally:
                self._pool.leave(instance, tokens=trace.tokens)
            if self._pool.has_another(tries.instances):
                trace.retried(self._pool.role.value)

    def _scout(self, request: web.Request, trace: RequestTrace, tries: _Tries) -> Scout | None:
        if not trace.kind or request.method != "POST":
            return None
        sort = "streamed" if trace.is_streamed else "whole"
        may_move = partial(self._pool.has_room_at_another, tries.instances)
        return Scout(self._pool.patience, sort, may_move)

    def _found(
        self, request: web.Request, promise: PrefillPromise | None, name: Name | None
    ) -> Asking | None:
        """Who knows what prefill has found for the answer. A response that is asked for later is
        the same one; a request that goes on with one has a prompt of its own, and no prefill."""
        if promise is not None:
            return promise.found
        if name is None or request.path == RESPONSES:
            return None

        async def kept() -> FoundCached | None:
            return self._keepers.found(name)

        return kept

    async def _noted(
        self,
        answer: Answer,
        request: web.Request,
        instance: Instance,
        promise: PrefillPromise | None,
    ) -> Answer:
        found = None
        if promise is not None and request.path == RESPONSES:
            found = await promise.found()
        return self._keepers.noting(answer, path=request.path, url=instance.url, found=found)

    async def _ask(
        self,
        tries: _Tries,
        request: web.Request,
        trace: RequestTrace,
        delivery: Delivery,
        body: bytes | None,
        suffix: str,
    ) -> Answer | Problem:
        """The beginning of the answer of the last of `tries`, or what is wrong with it."""
        instance, num_tries = tries.instances[-1], len(tries.instances)
        suffix = (f"-r{num_tries}" if num_tries > 1 else "") + suffix
        asked_s = instance.breaker.clock()
        try:
            answer = await self._asker.ask(
                instance, request, body, trace, suffix=suffix, scout=tries.scout
            )
        except upstream.UNREACHABLE as error:
            return self._unanswered(tries, error, trace, asked_s)
        if tries.scout is not None and answer.upstream.ok:
            tries.scout.answered(instance, instance.breaker.clock() - asked_s)
        return self._judged(tries, answer, request.method, is_resuming=bool(delivery.response))

    def _unanswered(
        self, tries: _Tries, error: BaseException, trace: RequestTrace, asked_s: float
    ) -> Problem:
        instance = tries.instances[-1]
        reason, text = self._asker.unanswered(instance, error, trace)
        if reason == upstream.OUT_OF_SOCKETS:
            return Problem(text, code=503, is_final=True)
        if isinstance(error, InstanceSilent):
            return Problem(text, code=504)
        if reason == "unreadable":
            is_final, tries.has_doubted = tries.has_doubted, True
            return Problem(text, code=502, is_final=is_final)
        if reason != "timeout":
            return Problem(text, code=502)
        # A whole answer takes as long elsewhere, and so does the beginning of a stream, unless the
        # instance has had nothing for anybody meanwhile.
        is_silent = trace.is_streamed and not instance.was_heard_since(asked_s)
        may_ask = is_silent and not tries.has_doubted
        tries.has_doubted = True
        return Problem(text, code=504, is_final=not may_ask)

    def _judged(
        self, tries: _Tries, answer: Answer, method: str, *, is_resuming: bool
    ) -> Answer | Problem:
        """The answer, if it is one for the client; otherwise it is held, and another is asked."""
        instance = tries.instances[-1]
        status = answer.upstream.status
        what = judged(instance, answer, method=method)
        if what.is_settled or is_resuming or not verdict.may_ask_another(method):
            return answer
        if what is not Verdict.BUSY:
            if tries.has_doubted:
                return answer
            tries.has_doubted = True
        if not self._pool.has_room_at_another(tries.instances):
            return answer
        tries.hold(answer, what)
        where = f"the {self._pool.role.value} instance at {instance.url}"
        if what is not Verdict.BUSY:
            logger.warning("%s answered %d; another one is asked", where, status)
        return Problem(f"{where} answered {status}", code=502)


async def _keep(
    promise: PrefillPromise | None, ask: Ask, delivery: Delivery, body: bytes | None
) -> Answer | Problem:
    """Who goes on with a stream is asked for more than the promise was about."""
    if promise is None or body is None or delivery.response is not None:
        size = len(body or b"")
        return await ask(await bodies.apart(partial(delivery.body, body), num_bytes=size), "")
    return await promise.keep(ask, body)
