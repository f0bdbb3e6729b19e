"""The prefill leg: a hint, whose failure costs time and nothing else.

Requests for the same prompt that are in flight together share one prefill. It goes on for as long
as one of them waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import aiohttp
from multidict import CIMultiDict
from xxhash import xxh3_128

from ucm.pd.fleet.affinity import Prefix
from ucm.pd.fleet.instance import Instance
from ucm.pd.fleet.pool import NoInstance, Pool, QueueFull
from ucm.pd.fleet.silence import InstanceSilent, Scout, unless_lost
from ucm.pd.legs import upstream, verdict
from ucm.pd.legs.asking import note
from ucm.pd.legs.rewrite import params_of
from ucm.pd.legs.usage import FoundCached, found_in
from ucm.pd.legs.verdict import Verdict

logger = logging.getLogger(__name__)

_SHOWN_BYTES = 500


@dataclass(frozen=True)
class PrefillOutcome:
    """`failure` is a reason for counters; None when the prompt is computed, `by` an instance.
    `receipt` is what that has to say to decode, as JSON, and `found` what it had of the prompt
    before, if it says so."""

    failure: str | None
    receipt: bytes | None = None
    found: FoundCached | None = None
    by: Instance | None = None


@dataclass(frozen=True)
class Leg:
    """What is asked of the prefill instance. `path` is the client's, with its query."""

    path: str
    headers: CIMultiDict[str]
    body: bytes
    tokens: int
    kind: str = ""
    prefix: Prefix | None = None

    @property
    def digest(self) -> bytes:
        """The same for legs that one prefill can serve: same prompt, for the same client."""
        parts = (self.path, self.headers.get("Authorization", ""))
        digest = xxh3_128()
        for part in parts:
            digest.update(part.encode(errors="surrogateescape") + b"\0")
        digest.update(self.body)
        return digest.digest()


@dataclass(eq=False)
class _Running:
    task: asyncio.Task[PrefillOutcome]
    tried: _Tried
    waiters: int = 0


@dataclass(eq=False)
class Share:
    """One request's part in a prefill, until it leaves. `is_shared` means that another request had
    asked for it."""

    task: asyncio.Task[PrefillOutcome]
    is_shared: bool
    on_leave: Callable[[], None]
    on_outrun: Callable[[], None] = lambda: None
    _has_left: bool = False

    @property
    def outcome(self) -> PrefillOutcome | None:
        """None while it runs."""
        if not self.task.done():
            return None
        # Whoever cancels it without being one who waits for it stops the proxy.
        return PrefillOutcome("cancelled") if self.task.cancelled() else self.task.result()

    def leave(self) -> None:
        if not self._has_left:
            self._has_left = True
            self.on_leave()

    def leave_outrun(self) -> None:
        """Decode has begun to answer, and this prefill has not ended since."""
        if not self._has_left and not self.task.done():
            self.on_outrun()
        self.leave()


@dataclass(eq=False)
class _Tried:
    """Whom one prefill has asked, and what has come of it. `refused` are those who say that they
    lack what it needs, a model or a key."""

    instances: list[Instance] = field(default_factory=list)
    refused: list[Instance] = field(default_factory=list)
    failure: str = "no_prefiller"
    is_late: bool = False
    # When the last of them was asked.
    asked_s: float = 0.0


def _unanswered(instance: Instance, tried: _Tried, error: BaseException) -> PrefillOutcome | None:
    """What the error says about the instance is noted. None if another one is to be asked."""
    tried.failure = upstream.failure_reason(error)
    logger.warning("prefill %s: %s (%s)", instance.url, tried.failure, error)
    if tried.failure == upstream.OUT_OF_SOCKETS:
        return PrefillOutcome(tried.failure)
    if tried.failure != "timeout":
        instance.failed()
        return None
    instance.shun(instance.breaker.open_s)
    if isinstance(error, InstanceSilent):
        return None
    # Another one would take as long, unless this one has had nothing for anybody meanwhile.
    may_ask = not instance.was_heard_since(tried.asked_s) and not tried.is_late
    tried.is_late = True
    return None if may_ask else PrefillOutcome(tried.failure)


def _outrun(tried: _Tried) -> None:
    """An instance that decode was quicker than, and that has had nothing for anybody meanwhile, may
    stand still: nobody waits long enough for its prefills to find that out otherwise."""
    instance = tried.instances[-1] if tried.instances else None
    if instance is not None and not instance.has_worked_since(tried.asked_s):
        instance.failed()


class Prefills:
    """Owned by the event loop's thread."""

    def __init__(
        self,
        client: upstream.Client,
        pool: Pool,
        *,
        timeout_s: float,
        max_answer_bytes: int,
        on_retry: Callable[[], None],
    ) -> None:
        self._client = client
        self._pool = pool
        self._timeout_s = timeout_s
        self._max_answer_bytes = max_answer_bytes
        self._on_retry = on_retry
        self._running: dict[bytes, _Running] = {}

    def join(self, leg: Leg) -> Share:
        """Begins a prefill, or takes part in one."""
        digest = leg.digest
        running = self._running.get(digest)
        is_shared = running is not None
        if running is None:
            tried = _Tried()
            running = _Running(asyncio.create_task(self._send(leg, tried)), tried)
            self._running[digest] = running
            running.task.add_done_callback(lambda task: self._forget(digest, task))
        running.waiters += 1
        return Share(
            running.task,
            is_shared,
            on_leave=partial(self._leave, digest, running),
            on_outrun=partial(_outrun, running.tried),
        )

    def _leave(self, digest: bytes, running: _Running) -> None:
        running.waiters -= 1
        if running.waiters == 0 and not running.task.done():
            # Nobody joins what is being cancelled.
            self._forget(digest, running.task)
            running.task.cancel()

    def _forget(self, digest: bytes, task: asyncio.Task[PrefillOutcome]) -> None:
        running = self._running.get(digest)
        if running is not None and running.task is task:
            del self._running[digest]

    async def _send(self, leg: Leg, tried: _Tried) -> PrefillOutcome:
        may_move = partial(self._pool.has_room_at_another, tried.instances)
        with contextlib.closing(Scout(self._pool.patience, "prefill", may_move)) as scout:
            return await self._ask_in_turn(leg, tried, scout)

    async def _ask_in_turn(self, leg: Leg, tried: _Tried, scout: Scout) -> PrefillOutcome:
        while True:
            try:
                instance = await self._pool.admit(
                    tokens=leg.tokens, but=tried.instances, kind=leg.kind, prefix=leg.prefix
                )
            except NoInstance:
                return PrefillOutcome(tried.failure)
            except QueueFull as error:
                logger.warning("not prefilled: %s", error)
                return PrefillOutcome("queue_full")
            tried.instances.append(instance)
            try:
                outcome = await self._ask(instance, leg, tried, scout)
            finally:
                self._pool.leave(instance, tokens=leg.tokens)
            if outcome is not None:
                return outcome
            if self._pool.has_another(tried.instances):
                self._on_retry()

    async def _ask(
        self, instance: Instance, leg: Leg, tried: _Tried, scout: Scout
    ) -> PrefillOutcome | None:
        """None if another instance is to be asked; `tried` says then why."""
        tried.asked_s = instance.breaker.clock()
        try:
            asking = asyncio.wait_for(self._response(instance, leg), self._timeout_s)
            response, answer = await unless_lost(instance, asking, scout)
        except upstream.UNREACHABLE as error:
            return _unanswered(instance, tried, error)
        instance.heard()
        what = verdict.of_status(response.status)
        note(instance, what)
        if what is Verdict.GOOD:
            scout.answered(instance, instance.breaker.clock() - tried.asked_s)
            for each in tried.refused:
                each.lacks(leg.kind)
            return PrefillOutcome(None, params_of(answer), found_in(answer), instance)
        shown = answer[:_SHOWN_BYTES]
        logger.warning("prefill %s answered %d: %s", instance.url, response.status, shown)
        tried.failure = f"{response.status // 100}xx"
        if what is Verdict.DOUBTED:
            tried.refused.append(instance)
        return PrefillOutcome(tried.failure) if what is Verdict.NO_WORD else None

    async def _response(self, instance: Instance, leg: Leg) -> tuple[aiohttp.ClientResponse, bytes]:
        response = await upstream.ask(
            self._client,
            "POST",
            upstream.target(instance.url, leg.path),
            body=leg.body,
            headers=leg.headers,
            idle_timeout_s=None,
        )
        async with response:
            return response, await upstream.read_whole(response, self._max_answer_bytes)
