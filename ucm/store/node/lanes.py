"""Threads by lane: what one part of storage does, the others don't feel.

A tier names its lanes (tier.py): parts of storage that hang, fail and recover each by itself, such
as the Posix tier's backends. Each has a pool of its own here, with its own queue, its own overdue
calls and its own stall. Promise: a call that was given to a lane's pool is about keys of that lane
only, so a lane that hangs costs its own keys and nothing else.

The lane of a key is asked for when a call is made, and stays that call's until it ends: which lane
a key has can change while the tier gets to know its parts. Everything here runs on the event loop's
thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ucm.store.blocks.keys import Key
from ucm.store.node.io_threads import LanePool
from ucm.store.tiers.tier import Tier

_T = TypeVar("_T")


class Lanes:
    """One pool per lane of `tier`, all with as many threads. There is none without storage: then
    nothing can be asked for."""

    def __init__(self, pools: Sequence[LanePool], tier: Tier) -> None:
        assert len(pools) == len(tier.lanes), "one pool per lane"
        self.pools = pools
        self._tier = tier
        self._names = tuple(tier.lanes)

    @property
    def num_threads(self) -> int:
        """Of one lane."""
        return self.pools[0].num_threads if self.pools else 0

    @property
    def depth(self) -> int:
        return sum(pool.depth for pool in self.pools)

    @property
    def num_overdue(self) -> int:
        return sum(pool.num_overdue for pool in self.pools)

    @property
    def num_stalled(self) -> int:
        return sum(pool.stalled for pool in self.pools)

    @property
    def is_hopeless(self) -> bool:
        """Something is queued, and only where nothing moves."""
        busy = [pool for pool in self.pools if pool.depth]
        return bool(busy) and all(pool.stalled for pool in busy)

    def tick(self) -> None:
        for pool in self.pools:
            pool.tick()

    def give_back_queue(self, *, urgent: bool) -> None:
        for pool in self.pools:
            pool.give_back_queue(urgent=urgent)

    def of(self, key: Key) -> LanePool:
        if len(self.pools) == 1:
            return self.pools[0]
        return self.pools[self._tier.lane_of(key)]

    def is_stalled(self, key: Key) -> bool:
        return self.num_stalled > 0 and self.of(key).stalled

    def split(
        self, items: Sequence[_T], key_of: Callable[[_T], Key]
    ) -> list[tuple[LanePool, list[_T]]]:
        """`items` by lane, in their order; lanes without any are left out."""
        if not items or not self.pools:
            return []
        if len(self.pools) == 1:
            return [(self.pools[0], list(items))]
        by_pool: dict[LanePool, list[_T]] = {}
        for item in items:
            by_pool.setdefault(self.of(key_of(item)), []).append(item)
        return list(by_pool.items())

    def name_of(self, pool: LanePool) -> str:
        """For people."""
        return self._names[self.pools.index(pool)]
