"""The write queue's places: how many pages may be dumped, or wait to be written, at a time.

Each lane of storage has `max_pages` of its own, so one that hangs fills its own and no other's.
A place is taken for a slot that is to be filled, and becomes the queued page's own; a page keeps
its lane from then on. Invariant: the load of a lane is its places taken and its pages queued.
"""

from __future__ import annotations

from collections import Counter

from ucm.store.blocks.keys import Key
from ucm.store.node.io_threads import LanePool
from ucm.store.node.lanes import Lanes


class Places:
    """Owned by the event loop's thread."""

    def __init__(self, lanes: Lanes, max_pages: int) -> None:
        self._lanes = lanes
        self._max_pages = max_pages
        self._taken: dict[Key, LanePool] = {}
        self._load: Counter[LanePool] = Counter()

    def is_full(self, key: Key) -> bool:
        return self._load[self._lanes.of(key)] >= self._max_pages

    def is_half_full(self, key: Key) -> bool:
        return self._load[self._lanes.of(key)] * 2 >= self._max_pages

    def take(self, key: Key) -> bool:
        """For a slot that is to be filled. False: there is no place left."""
        if key in self._taken:
            return True
        if self.is_full(key):
            return False
        pool = self._taken[key] = self._lanes.of(key)
        self._load[pool] += 1
        return True

    def give_back(self, key: Key) -> bool:
        """Whether one was taken for `key`."""
        pool = self._taken.pop(key, None)
        if pool is not None:
            self._load[pool] -= 1
        return pool is not None

    def enter(self, key: Key) -> LanePool | None:
        """The page is to be queued, at the place that was taken for it or at another one. Returns
        the threads that write it, which it has to `leave`; None if there is no place."""
        if not self.give_back(key) and self.is_full(key):
            return None
        pool = self._lanes.of(key)
        self._load[pool] += 1
        return pool

    def leave(self, pool: LanePool) -> None:
        """The page is not queued any more."""
        self._load[pool] -= 1
