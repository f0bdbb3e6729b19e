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
from dataclasses import dataclass, field
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
    future: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


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
            self._wake()
            return False
        self.instances.append(Instance(url, self.role, self._make_breaker()))
        self._wake()
        return True

    def remove(self, url: URL) -> bool:
        """Its requests go on; it gets no new ones."""
        known = self.find(url)
        if known is None:
            return False
        self.instances.remove(known)
        self._wake()
        return True

    def drain(self, url: URL) -> bool:
        known = self.find(url)
        if known is not None:
            known.draining = True
            self._wake()
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
        instance = await self._admit(but)
        instance.running += 1
        instance.tokens += tokens
        instance.served += 1
        instance.breaker.begin()
        return instance

    def leave(self, instance: Instance, *, tokens: int) -> None:
        instance.running -= 1
        instance.tokens -= tokens
        instance.breaker.ended()
        self._wake()

    async def _admit(self, but: Collection[Instance]) -> Instance:
        deadline_s = time.monotonic() + self._queue_timeout_s
        first = True
        while True:
            # Those that wait already are before a new one, not before one whose turn it is.
            if not (first and self._waiting):
                chosen = self._choose(but)
                if chosen is not None:
                    return chosen
            if first and len(self._waiting) >= self._max_queued:
                raise QueueFull(f"{len(self._waiting)} requests wait for {self.role.value} already")
            await self._wait(deadline_s - time.monotonic(), in_front=not first)
            first = False

    async def _wait(self, timeout_s: float, *, in_front: bool) -> None:
        waiter = _Waiter()
        if in_front:
            self._waiting.appendleft(waiter)
        else:
            self._waiting.append(waiter)
        try:
            await asyncio.wait_for(waiter.future, timeout_s)
        except BaseException as error:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            else:
                self._wake()  # it was this one's turn, and it has left
            if isinstance(error, asyncio.TimeoutError):
                raise QueueFull(
                    f"no {self.role.value} instance was free within {self._queue_timeout_s:g} s"
                ) from None
            raise

    def _wake(self) -> None:
        if self._waiting:
            future = self._waiting.popleft().future
            if not future.done():
                future.set_result(None)

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
