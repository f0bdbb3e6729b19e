"""Storage whose every question is a request: a page that is there stands for those before it, and
reading them tells where that is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parts.node import Node, key
from tests.store.tiers.memory_tier import MemoryTier
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.tiers.tier import TierNamespace, leading_by_order

KEYS = [key(i) for i in range(24)]


class FarTier(MemoryTier):
    """Counts its questions."""

    def __init__(self) -> None:
        super().__init__()
        self.num_asked = 0

    def contains(self, namespace: TierNamespace, keys: Sequence[Key]) -> int:
        self.num_asked += len(keys)
        return super().contains(namespace, keys)

    def leads_to(self, namespace: TierNamespace, keys: Sequence[Key], *, now: bool = False) -> int:
        def is_there(i: int) -> bool:
            return self.contains(namespace, [keys[i]]) == 1

        return leading_by_order(len(keys), is_there)


@given(st.integers(1, 200), st.data())
def test_of_a_prefix_all_is_counted_with_few_questions(count: int, data: st.DataObject) -> None:
    num_there = data.draw(st.integers(0, count))
    asked: list[int] = []

    def is_there(i: int) -> bool:
        asked.append(i)
        return i < num_there

    assert leading_by_order(count, is_there) == num_there
    assert len(asked) == len(set(asked)) <= 2 + count.bit_length()
    assert len(asked) <= {0: 1, count: 2}.get(num_there, len(asked))


@given(st.lists(st.booleans(), max_size=40))
def test_with_holes_the_first_and_the_last_that_are_counted_are_there(there: list[bool]) -> None:
    leading = leading_by_order(len(there), there.__getitem__)

    assert (leading > 0) is (there[:1] == [True])
    assert leading == 0 or there[leading - 1]
    assert leading == len(there) or not there[leading]


def test_a_long_hit_takes_two_questions_for_each_group() -> None:
    tier = FarTier()
    node = Node(tier=tier)
    node.store(*KEYS)
    tier.num_asked = 0
    node.look_up(KEYS, number=1)
    node.reads.end_all()

    reply = node.reply()
    assert reply is not None and (len(reply.offsets), reply.reason) == (24, "")
    assert tier.num_asked == 4


@given(st.sets(st.integers(0, 23)))
def test_a_lookup_gives_exactly_what_is_there_before_the_first_hole(holes: set[int]) -> None:
    node = Node(tier=FarTier())
    node.store(*(each for i, each in enumerate(KEYS) if i not in holes))
    node.look_up(KEYS, number=1)
    while node.reads.jobs:
        node.reads.end(-1)  # what comes last is read first
        node.core.check()

    reply = node.reply()
    assert reply is not None
    assert len(reply.offsets) == min(holes, default=24)
    assert reply.reason == ("never_stored" if holes else "")


@pytest.mark.parametrize("hole", [1, 6, 8, 20])
def test_a_hole_in_what_is_promised_ends_the_prefix_there_and_at_once(hole: int) -> None:
    node = Node(tier=FarTier())
    node.store(*KEYS[:hole], *KEYS[hole + 1 :])
    node.expect(KEYS)
    for _ in range(8):
        node.reads.end_all()
        node.timers.fire()

    reply = node.reply()
    assert reply is not None and (len(reply.offsets), reply.reason) == (hole, "evicted")


def test_what_order_tells_is_not_taken_to_be_saved() -> None:
    """A receipt would promise it. Block 3 is not there, and its page is not read."""
    node = Node(tier=FarTier(), num_slots=8)
    node.store(*KEYS[:3], *KEYS[4:8])
    node.look_up(KEYS[:8], number=1)
    node.reads.end_one()  # it is probed

    assert not any(node.core.writeback.was_stored(each) for each in KEYS)
    node.reads.end_all()
    stored = [node.core.writeback.was_stored(each) for each in KEYS[:4]]
    assert stored == [True, True, True, False]


def test_who_reads_nothing_is_told_exactly() -> None:
    node = Node(tier=FarTier())
    node.store(*KEYS[:3], *KEYS[4:8])
    lookup = p.Lookup(id=1, ns=1, keys=list(KEYS), read_from=0, load=False, timeout_ms=1000)
    node.core.handle(node.connection, lookup)
    node.reads.end_all()

    reply = node.reply()
    assert reply is not None and (reply.num_stored, reply.reason) == (3, "never_stored")
