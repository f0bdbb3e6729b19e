"""The instances behind the proxy: who is there, who is well, and who gets the next request.

A pool is one role. A request is admitted to an instance when the instance runs less than it may;
otherwise it waits its turn, in order, within bounds of number and time. One that only a certain
instance can answer waits for that one, and stands in nobody's way.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from yarl import URL

from ucm.pd.fleet.affinity import Homes, Prefix
from ucm.pd.fleet.breaker import Breaker
from ucm.pd.fleet.instance import Instance, Role
from ucm.pd.fleet.silence import Patience


class QueueFull(Exception):
    """Too many wait already, or this one has waited too long."""


class NoInstance(Exception):
    """Nobody of this role is left to ask."""


@dataclass(eq=False)
class _Waiter:
    tokens: int
    but: tuple[Instance, ...]
    kind: str
    future: asyncio.Future[Instance]
    # The only one that will do.
    only: Instance | None = None
    prefix: Prefix | None = None


@dataclass(frozen=True, kw_only=True)
class PoolRules:
    """As the proxy's flags of the same names."""

    policy: str = "least-loaded"
    max_running: int
    max_queued: int
    queue_timeout_s: float
    silent_after_s: float
    breaker_failures: int
    breaker_open_s: float
    affinity: str = "none"
    affinity_max_ahead: int = 0
    max_places: int = 0


class Pool:
    """All instances of one role. Owned by the event loop's thread."""

    def __init__(
        self,
        role: Role,
        rules: PoolRules,
    ) -> None:
        self.role = role
        self.instances: list[Instance] = []
        self.patience = Patience(rules.silent_after_s)
        self.places: Homes | None = None
        if rules.affinity == "prefix":
            self.places = Homes(max_ahead=rules.affinity_max_ahead, max_places=rules.max_places)
        self._rules = rules
        self._turns = itertools.count()
        self._waiting: deque[_Waiter] = deque()
        # Those who wait for a certain instance.
        self._bound: deque[_Waiter] = deque()

    @property
    def num_queued(self) -> int:
        return len(self._waiting) + len(self._bound)

    def add(self, url: URL) -> bool:
        """False if it is there already (it is then not draining any more)."""
        known = self.find(url)
        if known is not None:
            known.draining = False
            self.dispatch()
            return False
        rules = self._rules
        breaker, health = (
            Breaker(rules.breaker_failures, rules.breaker_open_s),
            Breaker(rules.breaker_failures, rules.breaker_open_s),
        )
        self.instances.append(Instance(url, self.role, breaker, health))
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
            each not in but and not each.draining and each.is_well for each in self.instances
        )

    def has_room_at_another(self, but: Collection[Instance]) -> bool:
        """Whether somebody else of this role could be asked at once."""
        return any(
            each not in but
            and not each.draining
            and each.is_well
            and each.running < self._rules.max_running
            for each in self.instances
        )

    async def admit(
        self,
        *,
        tokens: int,
        but: Collection[Instance] = (),
        kind: str = "",
        prefix: Prefix | None = None,
    ) -> Instance:
        """An instance for one request, counted as running there until `leave`. `kind` is what
        `Instance.lacks` is told. With a `prefix` it is where that lies, if there is affinity.

        Raises NoInstance when all were tried (`but`) or none is there, QueueFull when it would have
        to wait longer than it may.
        """
        future: asyncio.Future[Instance] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(tokens, tuple(but), kind, future, prefix=prefix)
        return await self._wait(waiter, self._waiting)

    async def admit_to(self, instance: Instance, *, tokens: int) -> None:
        """The same for a request that nobody else can answer, whether the instance is well or
        drains. Raises QueueFull."""
        future: asyncio.Future[Instance] = asyncio.get_running_loop().create_future()
        await self._wait(_Waiter(tokens, (), "", future, only=instance), self._bound)

    async def _wait(self, waiter: _Waiter, queue: deque[_Waiter]) -> Instance:
        future = waiter.future
        queue.append(waiter)
        self.dispatch()
        if future.done():
            return future.result()
        if self.num_queued > self._rules.max_queued:
            queue.remove(waiter)
            raise QueueFull(f"{self._rules.max_queued} requests wait for {self.role.value} already")
        try:
            # Not wait_for: before Python 3.12 it may swallow that its caller was cancelled.
            done, _ = await asyncio.wait([future], timeout=self._rules.queue_timeout_s)
        except asyncio.CancelledError:
            self._withdraw(waiter)
            raise
        if not done:
            self._withdraw(waiter)
            raise QueueFull(
                f"no {self.role.value} instance was free within {self._rules.queue_timeout_s:g} s"
            )
        return future.result()

    def _withdraw(self, waiter: _Waiter) -> None:
        queue = self._waiting if waiter.only is None else self._bound
        if waiter in queue:
            queue.remove(waiter)
            waiter.future.cancel()
        elif waiter.future.done() and waiter.future.exception() is None:
            self.leave(waiter.future.result(), tokens=waiter.tokens)

    def dispatch(self) -> None:
        """Gives those who wait what is free, in order; one whom nothing free suits lets others go
        first. To be called when something may have become free."""
        self._dispatch_bound()
        passed_over: list[_Waiter] = []
        while self._waiting and self._may_suit_somebody():
            waiter = self._waiting.popleft()
            try:
                chosen = self._choose(waiter)
            except NoInstance as error:
                waiter.future.set_exception(error)
                continue
            if chosen is None:
                passed_over.append(waiter)
                continue
            _give(chosen, waiter)
        self._waiting.extendleft(reversed(passed_over))

    def _dispatch_bound(self) -> None:
        for waiter in list(self._bound):
            if waiter.only is not None and waiter.only.running < self._rules.max_running:
                self._bound.remove(waiter)
                _give(waiter.only, waiter)

    def _may_suit_somebody(self) -> bool:
        there = [each for each in self.instances if not each.draining]
        return not there or any(each.running < self._rules.max_running for each in there)

    def leave(self, instance: Instance, *, tokens: int) -> None:
        instance.running -= 1
        instance.tokens -= tokens
        instance.ended()
        self.dispatch()

    def _choose(self, waiter: _Waiter) -> Instance | None:
        """None: all of them are full. Raises NoInstance."""
        there = [each for each in self.instances if not each.draining and each not in waiter.but]
        if not there:
            raise NoInstance(f"there is no {self.role.value} instance to ask")
        # Where all are said to be unwell, that may be wrong: asking beats refusing.
        well = [each for each in there if each.is_well] or there
        free = [each for each in well if each.running < self._rules.max_running]
        fit = [each for each in free if not each.is_unfit(waiter.kind)] or free
        if fit and self.places is not None and waiter.prefix is not None:
            near = self._within_tokens(_not_shunned(fit), waiter.tokens)
            return _at_home(near, self.places, waiter.prefix)
        return self._best(fit) if fit else None

    def _best(self, free: list[Instance]) -> Instance:
        turn = next(self._turns)
        if self._rules.policy == "round-robin":
            return free[turn % len(free)]
        free = _not_shunned(free)
        load = min(map(self._load, free))
        ties = [each for each in free if self._load(each) == load]
        return ties[turn % len(ties)]

    def _within_tokens(self, free: list[Instance], tokens: int) -> list[Instance]:
        """A prefill that waits at its place for more tokens than it has itself might as well be
        computed anew elsewhere."""
        if self.role is not Role.PREFILL:
            return free
        most = min(each.tokens for each in free) + tokens
        return [each for each in free if each.tokens <= most]

    def _load(self, instance: Instance) -> int:
        """A prefill takes as long as its prompt; decoding goes on beside other decoding."""
        return instance.tokens if self.role is Role.PREFILL else instance.running


def _not_shunned(free: list[Instance]) -> list[Instance]:
    return [each for each in free if not each.is_shunned] or free


def _at_home(free: list[Instance], places: Homes, prefix: Prefix) -> Instance:
    by_url = {each.url: each for each in free}
    return by_url[places.choose(prefix, {url: each.running for url, each in by_url.items()})]


def _give(instance: Instance, waiter: _Waiter) -> None:
    instance.running += 1
    instance.tokens += waiter.tokens
    instance.served += 1
    instance.begin()
    waiter.future.set_result(instance)


def all_instances(pools: Iterable[Pool]) -> list[Instance]:
    return [each for pool in pools for each in pool.instances]
