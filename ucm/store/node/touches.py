"""Pages that are used are touched in storage, so that reclaim takes others first.

A page is touched no more often than `every_s`. What waits is bounded, each page waits once, and
when storage is slow it is dropped: a touch that is lost makes a page look a little older. Touches
go where threads are idle: reads and questions come first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from functools import partial

from ucm.store.blocks.keys import Key
from ucm.store.node.io_threads import LanePool
from ucm.store.node.parts import NodeParts
from ucm.store.node.sessions import OpenedNamespace

# Of pages that were touched lately, and of those that wait.
_MAX_REMEMBERED = 1 << 18
_MAX_WAITING = 1 << 13
_MAX_GROUP = 64
# Prompts whose blocks are still to be counted, and how many blocks are at a time.
_MAX_PROMPTS = 1024
_MAX_COUNTED = 2048


class Touches:
    """Owned by the event loop's thread. `every_s` of None: nothing is ever touched."""

    def __init__(self, parts: NodeParts) -> None:
        self._tier = parts.tier
        self._lanes = parts.reads
        self._count = parts.count
        self._clock = parts.clock
        self._every_s = parts.limits.touch_every_s
        self._touched_s: OrderedDict[Key, float] = OrderedDict()
        self._waiting: OrderedDict[Key, OpenedNamespace] = OrderedDict()
        self._running: set[LanePool] = set()
        self._prompts: deque[Sequence[Key]] = deque(maxlen=_MAX_PROMPTS)

    def asked(self, keys: Sequence[Key]) -> None:
        """Somebody asks for this prompt. The tier hears of it a little later: an answer waits."""
        if self._every_s is not None:
            self._prompts.append(keys)

    def use(self, namespace: OpenedNamespace, keys: Sequence[Key]) -> None:
        """Somebody uses these pages, in the order of their prompt."""
        if self._every_s is None:
            return
        now_s = self._clock()
        # The head last: it is to be kept longest.
        for key in reversed(keys):
            touched_s = self._touched_s.get(key)
            if touched_s is not None and now_s - touched_s < self._every_s:
                continue
            if len(self._waiting) >= _MAX_WAITING:
                self._count("touch_dropped")
                continue
            self._touched_s[key] = now_s
            self._touched_s.move_to_end(key)
            self._waiting[key] = namespace
        while len(self._touched_s) > _MAX_REMEMBERED:
            self._touched_s.popitem(last=False)

    def tick(self) -> None:
        """Hands some to threads that have nothing else to do."""
        num_counted = 0
        while self._prompts and num_counted < _MAX_COUNTED:
            keys = self._prompts.popleft()
            self._tier.asked(keys)
            num_counted += len(keys)
        for pool in self._lanes.pools:
            if self._waiting and pool not in self._running and pool.depth < pool.num_threads:
                self._begin(pool)

    def _begin(self, pool: LanePool) -> None:
        group: list[Key] = []
        namespace = None
        for key, of in self._waiting.items():
            if self._lanes.of(key) is pool and namespace in (None, of):
                namespace = of
                group.append(key)
                if len(group) == _MAX_GROUP:
                    break
        if namespace is None:
            return
        for key in group:
            del self._waiting[key]
        self._running.add(pool)
        pool.submit(
            partial(self._tier.touch, namespace.tier, group), partial(self._on_touched, pool, group)
        )

    def _on_touched(self, pool: LanePool, group: list[Key], _: object) -> None:
        self._running.discard(pool)
        self._count("touched", len(group))
