"""The prefill leg: a hint, whose failure costs time and nothing else.

Requests for the same prompt that are in flight together share one prefill. It goes on for as long
as one of them waits for it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import aiohttp
from multidict import CIMultiDict
from xxhash import xxh3_128_digest

from ucm.pd import upstream
from ucm.pd.instances import Instance, NoInstance, Pool, QueueFull
from ucm.pd.rewrite import params_of

logger = logging.getLogger(__name__)

_SHOWN_BYTES = 500


@dataclass(frozen=True)
class PrefillOutcome:
    """`failure` is a reason for counters; None when the prompt is computed. `receipt` is what the
    instance has to say to decode, as JSON, if it has."""

    failure: str | None
    receipt: bytes | None = None


@dataclass(frozen=True)
class Leg:
    """What is asked of the prefill instance. `path` is the client's, with its query."""

    path: str
    headers: CIMultiDict[str]
    body: bytes
    tokens: int

    @property
    def digest(self) -> bytes:
        """The same for legs that one prefill can serve: same prompt, for the same client."""
        parts = (self.path, self.headers.get("Authorization", ""))
        heads = [part.encode(errors="surrogateescape") for part in parts]
        return xxh3_128_digest(b"\0".join([*heads, self.body]))


@dataclass(eq=False)
class _Running:
    task: asyncio.Task[PrefillOutcome]
    waiters: int = 0


@dataclass(eq=False)
class Share:
    """One request's part in a prefill, until it leaves. `is_shared` means that another request had
    asked for it."""

    task: asyncio.Task[PrefillOutcome]
    is_shared: bool
    on_leave: Callable[[], None]
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


class Prefills:
    """Owned by the event loop's thread."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        pool: Pool,
        *,
        timeout_s: float,
        on_retry: Callable[[], None],
    ) -> None:
        self._session = session
        self._pool = pool
        self._timeout_s = timeout_s
        self._on_retry = on_retry
        self._running: dict[bytes, _Running] = {}

    def join(self, leg: Leg) -> Share:
        """Begins a prefill, or takes part in one."""
        digest = leg.digest
        running = self._running.get(digest)
        is_shared = running is not None
        if running is None:
            running = self._running[digest] = _Running(asyncio.create_task(self._send(leg)))
            running.task.add_done_callback(lambda task: self._forget(digest, task))
        running.waiters += 1
        return Share(running.task, is_shared, partial(self._leave, digest, running))

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

    async def _send(self, leg: Leg) -> PrefillOutcome:
        tried: list[Instance] = []
        failure = "no_prefiller"
        while True:
            try:
                instance = await self._pool.admit(tokens=leg.tokens, but=tried)
            except NoInstance:
                return PrefillOutcome(failure)
            except QueueFull as error:
                logger.warning("not prefilled: %s", error)
                return PrefillOutcome("queue_full")
            try:
                return await asyncio.wait_for(self._ask(instance, leg), self._timeout_s)
            except upstream.UNREACHABLE as error:
                failure = upstream.failure_reason(error)
                logger.warning("prefill %s: %s (%s)", instance.url, failure, error)
                if failure == "timeout":
                    return PrefillOutcome(failure)  # another one would take as long
                instance.breaker.failed()
            finally:
                self._pool.leave(instance, tokens=leg.tokens)
            tried.append(instance)
            if self._pool.has_another(tried):
                self._on_retry()

    async def _ask(self, instance: Instance, leg: Leg) -> PrefillOutcome:
        response = await upstream.ask(
            self._session,
            "POST",
            upstream.target(instance.url, leg.path),
            body=leg.body,
            headers=leg.headers,
        )
        async with response:
            answer = await response.read()
        instance.breaker.succeeded()
        if response.ok:
            return PrefillOutcome(None, params_of(answer))
        logger.warning(
            "prefill %s answered %d: %s", instance.url, response.status, answer[:_SHOWN_BYTES]
        )
        return PrefillOutcome(f"{response.status // 100}xx")
