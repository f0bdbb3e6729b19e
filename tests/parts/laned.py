"""Storage of two lanes in memory, which notices a call that is not its lane's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.parts.node import Node
from tests.parts.pools import DisorderlyPool, HeldPool
from tests.store.tiers.memory_tier import MemoryTier
from ucm.store.blocks.keys import Key
from ucm.store.node.lanes import Lanes
from ucm.store.tiers.tier import PageRead, Staged, TierNamespace


class LanedTier(MemoryTier):
    """`running`: the lane whose thread is in here; None for the test's own calls."""

    lanes = ("even", "odd")

    def __init__(self) -> None:
        super().__init__()
        self.running: int | None = None

    def lane_of(self, key: Key) -> int:
        return key[0] % 2

    def _check(self, keys: Sequence[Key]) -> None:
        assert self.running is None or {self.lane_of(key) for key in keys} <= {self.running}

    def contains(self, namespace: TierNamespace, keys: Sequence[Key]) -> int:
        self._check(keys)
        return super().contains(namespace, keys)

    def doubt(self, namespace: TierNamespace, key: Key) -> None:
        self._check([key])

    def read(self, namespace: TierNamespace, key: Key, page: memoryview) -> PageRead:
        self._check([key])
        return super().read(namespace, key, page)

    def stage(
        self, namespace: TierNamespace, key: Key, page: memoryview, *, num_tokens: int
    ) -> Staged | None:
        self._check([key])
        return super().stage(namespace, key, page, num_tokens=num_tokens)

    def publish(self, staged: Staged) -> None:
        self._check([staged.key])
        super().publish(staged)

    def discard(self, staged: Staged) -> None:
        self._check([staged.key])
        super().discard(staged)


class LanePool:
    """The part of `pool` that is one lane's."""

    def __init__(self, pool: DisorderlyPool | HeldPool, tier: LanedTier, lane: int) -> None:
        self._pool, self._tier, self._lane = pool, tier, lane
        self.num_threads = pool.num_threads

    @property
    def depth(self) -> int:
        return sum(job[0].lane == self._lane for job in [*self._pool.jobs, *self._pool.hung])

    @property
    def num_overdue(self) -> int:
        return sum(job[0].lane == self._lane for job in self._pool.hung)

    @property
    def stalled(self) -> bool:
        return self.num_overdue * 2 >= self.num_threads

    def submit(self, call, on_done, *, on_overdue=None, urgent=False) -> None:
        in_lane = _InLane(call, self._tier, self._lane, is_question=urgent)
        self._pool.submit(in_lane, on_done, on_overdue=on_overdue, urgent=urgent)

    def tick(self) -> None:
        pass


class _InLane:
    """`is_question`: it asks what is there, and reads no page."""

    def __init__(
        self, call: Callable[[], object], tier: LanedTier, lane: int, *, is_question: bool
    ) -> None:
        self._call, self._tier, self.lane, self.is_question = call, tier, lane, is_question

    def __call__(self) -> object:
        self._tier.running = self.lane
        try:
            return self._call()
        finally:
            self._tier.running = None


def lanes_of(pool: DisorderlyPool | HeldPool, tier: LanedTier) -> Lanes:
    return Lanes([LanePool(pool, tier, lane) for lane in range(len(tier.lanes))], tier)


class LanedNode(Node):
    def __init__(self, *, num_slots: int = 64) -> None:
        super().__init__(tier=LanedTier(), num_slots=num_slots)

    def lanes(self, pool: HeldPool) -> Lanes:
        assert isinstance(self.tier, LanedTier)
        return lanes_of(pool, self.tier)
