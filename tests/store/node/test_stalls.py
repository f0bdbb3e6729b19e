"""That storage hangs is told once, and so is that it answers again."""

from __future__ import annotations

import logging

import pytest

from tests.parts.pools import DisorderlyPool
from tests.store.tiers.memory_tier import MemoryTier
from ucm.store.node.lanes import Lanes
from ucm.store.node.notices import Notices
from ucm.store.node.stalls import Stalls


class TwoLanes(MemoryTier):
    lanes = ("/mnt/a", "/mnt/b")


def hang(pool: DisorderlyPool, count: int) -> None:
    for _ in range(count):
        pool.submit(lambda: None, lambda result: None)
        pool.hang(0)


def test_storage_that_hangs_is_told_once_by_name_and_so_is_that_it_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = 0.0
    pools = [DisorderlyPool(), DisorderlyPool()]
    stalls = Stalls([("read", Lanes(pools, TwoLanes()))], Notices(lambda: now_s))
    stalls.tick()
    hang(pools[1], pools[1].num_threads // 2 - 1)
    stalls.tick()
    assert [] == caplog.messages

    with caplog.at_level(logging.INFO):
        hang(pools[1], 1)
        for _ in range(1000):
            now_s += 1.0
            stalls.tick()
        (said,) = caplog.messages
        assert said.startswith("storage hangs: /mnt/b can't be read: 2 calls have not ended")

        pools[1].return_late()
        for _ in range(1000):
            stalls.tick()
    assert ["storage answers: /mnt/b can be read"] == caplog.messages[1:]


def test_storage_that_hangs_on_and_off_is_told_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s, pool = 0.0, DisorderlyPool()
    stalls = Stalls([("written", Lanes([pool], MemoryTier()))], Notices(lambda: now_s))
    hang(pool, pool.num_threads // 2 - 1)
    for _ in range(600):
        now_s += 0.5
        hang(pool, 1)
        stalls.tick()
        pool.return_late()
        stalls.tick()
    assert len(caplog.messages) <= 2 * 6
