"""The instances behind the proxy: who is there, who is well, and who gets the next request.

A pool is one role. A request is admitted to an instance when the instance runs less than it may;
otherwise it waits its turn, in order, within bounds of number and time.

A breaker per instance keeps requests away from one that can't be reached:

    CLOSED ──failures in a row──► OPEN ──after a while──► one request tries ──► CLOSED, or OPEN

A health check counts like a request.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import Enum

from yarl import URL


class Role(str, Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    # Instances of one pool that do both; there is no prefill leg.
    WORKER = "worker"


@dataclass
class Breaker:
    """Pure but for the clock. See the module."""

    max_failures: int
    open_s: float
    clock: Callable[[], float] = time.monotonic
    failures: int = 0
    closed_again_s: float = 0.0
    _is_trying: bool = False

    @property
    def state(self) -> str:
        if self.failures < self.max_failures:
            return "closed"
        return "open" if self.clock() < self.closed_again_s else "half-open"

    def allows(self) -> bool:
        state = self.state
        return state == "closed" or (state == "half-open" and not self._is_trying)

    def begin(self) -> None:
        self._is_trying = self.state == "half-open"

    def ended(self) -> None:
        """The request that tried is over without a word about the instance."""
        self._is_trying = False

    def succeeded(self) -> None:
        self.failures, self._is_trying = 0, False

    def failed(self) -> None:
        self._is_trying = False
        self.failures += 1
        if self.failures >= self.max_failures:
            self.closed_again_s = self.clock() + self.open_s


@dataclass(eq=False)
class Instance:
    """One server. `running` requests and their `tokens` are those that this proxy has sent."""

    url: URL
    role: Role
    breaker: Breaker
    running: int = 0
    tokens: int = 0
    served: int = 0
    draining: bool = False

    @property
    def state(self) -> str:
        return "draining" if self.draining else self.breaker.state


class QueueFull(Exception):
    """Too many wait already, or this one has waited too long."""


class NoInstance(Exception):
    """Nobody of this role is left to ask."""


@dataclass(eq=False)
class _Waiter:
    tokens: int
    but: tuple[Instance, ...]
    future: asyncio.Future[Instance]


class Pool:
    """All instances of one role. Owned by the event loop's thread."""

    def __init__(
        self,
        role: Role,
        *,
        policy: str,
        max_running: int,
        max_queued: int,
        queue_timeout_s: float,
        make_breaker: Callable[[], Breaker],
    ) -> None:
        self.role = role
        self.instances: list[Instance] = []
        self._policy = policy
        self._max_running = max_running
        self._max_queued = max_queued
        self._queue_timeout_s = queue_timeout_s
        self._make_breaker = make_breaker
        self._turns = itertools.count()
        self._waiting: deque[_Waiter] = deque()

    @property
    def num_queued(self) -> int:
        return len(self._waiting)

    def add(self, url: URL) -> bool:
        """False if it is there already (it is then not draining any more)."""
        known = self.find(url)
        if known is not None:
            known.draining = False
            self.dispatch()
            return False
        self.instances.append(Instance(url, self.role, self._make_breaker()))
        self.dispatch()
        return True

    def remove(self, url: URL) -> bool:
        """Its requests go on; it gets no new ones."""
        known = self.find(url)
        if known is None:
            return False
        self.instances.remove(known)
        self.dispatch()
        return True

    def drain(self, url: URL) -> bool:
        known = self.find(url)
        if known is not None:
            known.draining = True
            self.dispatch()
        return known is not None

    def find(self, url: URL) -> Instance | None:
        return next((each for each in self.instances if each.url == url), None)

    def has_another(self, but: Collection[Instance]) -> bool:
        """Whether somebody else of this role could be asked."""
        return any(
            each not in but and not each.draining and each.breaker.allows()
            for each in self.instances
        )

    async def admit(self, *, tokens: int, but: Collection[Instance] = ()) -> Instance:
        """An instance for one request, counted as running there until `leave`.

        Raises NoInstance when all were tried (`but`) or none is there, QueueFull when it would have
        to wait longer than it may.
        """
        future: asyncio.Future[Instance] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(tokens, tuple(but), future)
        self._waiting.append(waiter)
        self.dispatch()
        if future.done():
            return future.result()
        if len(self._waiting) > self._max_queued:
            self._waiting.remove(waiter)
            raise QueueFull(f"{self._max_queued} requests wait for {self.role.value} already")
        try:
            # Not wait_for: before Python 3.12 it may swallow that its caller was cancelled.
            done, _ = await asyncio.wait([future], timeout=self._queue_timeout_s)
        except asyncio.CancelledError:
            self._withdraw(waiter)
            raise
        if not done:
            self._withdraw(waiter)
            raise QueueFull(
                f"no {self.role.value} instance was free within {self._queue_timeout_s:g} s"
            )
        return future.result()

    def _withdraw(self, waiter: _Waiter) -> None:
        if waiter in self._waiting:
            self._waiting.remove(waiter)
            waiter.future.cancel()
        elif waiter.future.done() and waiter.future.exception() is None:
            self.leave(waiter.future.result(), tokens=waiter.tokens)

    def dispatch(self) -> None:
        """Gives those who wait what is free, in order; one whom nothing free suits lets others go
        first. To be called when something may have become free."""
        passed_over: list[_Waiter] = []
        while self._waiting and self._may_suit_somebody():
            waiter = self._waiting.popleft()
            try:
                chosen = self._choose(waiter.but)
            except NoInstance as error:
                waiter.future.set_exception(error)
                continue
            if chosen is None:
                passed_over.append(waiter)
                continue
            chosen.running += 1
            chosen.tokens += waiter.tokens
            chosen.served += 1
            chosen.breaker.begin()
            waiter.future.set_result(chosen)
        self._waiting.extendleft(reversed(passed_over))

    def _may_suit_somebody(self) -> bool:
        there = [each for each in self.instances if not each.draining]
        return not there or any(each.running < self._max_running for each in there)

    def leave(self, instance: Instance, *, tokens: int) -> None:
        instance.running -= 1
        instance.tokens -= tokens
        instance.breaker.ended()
        self.dispatch()

    def _choose(self, but: Collection[Instance]) -> Instance | None:
        """None: all of them are full. Raises NoInstance."""
        there = [each for each in self.instances if not each.draining and each not in but]
        if not there:
            raise NoInstance(f"there is no {self.role.value} instance to ask")
        # Where all are said to be unwell, that may be wrong: asking beats refusing.
        well = [each for each in there if each.breaker.allows()] or there
        free = [each for each in well if each.running < self._max_running]
        return self._best(free) if free else None

    def _best(self, free: list[Instance]) -> Instance:
        turn = next(self._turns)
        if self._policy == "round-robin":
            return free[turn % len(free)]
        load = min(map(self._load, free))
        ties = [each for each in free if self._load(each) == load]
        return ties[turn % len(ties)]

    def _load(self, instance: Instance) -> int:
        """A prefill takes as long as its prompt; decoding goes on beside other decoding."""
        return instance.tokens if self.role is Role.PREFILL else instance.running


def all_instances(pools: Iterable[Pool]) -> list[Instance]:
    return [each for pool in pools for each in pool.instances]
