"""Write-back to storage of two lanes, of which one may hang at any moment."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.parts.laned import LanedTier
from tests.parts.pools import HeldPool
from tests.store.node.test_writeback import ORDER, TREE, Bench, prompt
from ucm.store.node.lanes import Lanes
from ucm.store.node.saved import Saving


class TwoLanes(Bench):
    """The lane of a key is `key[0] % 2`. What hangs is stalled at once."""

    def make_tier(self) -> LanedTier:
        return LanedTier()

    def make_lanes(self) -> Lanes:
        self.pools = [HeldPool(), HeldPool()]
        return Lanes(self.pools, self.tier)

    def hang(self, lane: int | None) -> None:
        for each, pool in enumerate(self.pools):
            pool.stalled = each == lane

    def end(self, index: int) -> None:
        """Any call of a lane that does not hang."""
        moving = [pool for pool in self.pools if pool.jobs and not pool.stalled]
        if moving:
            moving[index % len(moving)].end(index)

    def end_all(self) -> None:
        while any(pool.jobs and not pool.stalled for pool in self.pools):
            self.end(0)


@given(ORDER, st.lists(st.sampled_from([None, 0, 1]), min_size=60, max_size=60))
def test_pages_of_a_lane_that_moves_keep_no_places_for_pages_of_one_that_hangs(
    order: list[int], hangs: list[int | None]
) -> None:
    """Whichever lane hangs when: files appear in prompt order, and at the end each page is stored
    or was told."""
    bench = TwoLanes(max_pages=18)
    keys = [key for chain in TREE for key in chain]
    for chain in TREE:
        bench.dump(chain)
    for index, lane in zip(order, hangs, strict=True):
        bench.hang(lane)
        bench.writeback.tick()
        bench.end(index)
        bench.check_order()
        if lane is not None:
            bench.end_all()
            bench.writeback.tick()
            bench.end_all()
            waiting = [key for key in keys if bench.writeback.state(key) is Saving.QUEUED]
            assert {key[0] % 2 for key in waiting} <= {lane}
    bench.hang(None)
    bench.end_all()

    assert all((key in bench.stored()) != (key in bench.told) for key in keys)
    bench.check_nothing_is_held()
    for lane in range(2):
        most = [key for key in prompt("more", 100) if key[0] % 2 == lane][:18]
        assert all(bench.writeback.take_place(key) for key in most), "every place is free again"
