"""Pages in memory whose files are looked for again: a few stand for many, each has its turn."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import log2
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parts.laned import LanedNode
from tests.parts.node import Node
from tests.store.node.test_by_order import FarTier
from tests.store.node.test_few_questions import KEYS, finish, replies
from ucm.store.blocks.keys import Key
from ucm.store.node.rechecks import standing

RECHECK_S = 10.0


def test_a_hundred_blocks_in_memory_take_few_questions_too_and_none_for_a_while() -> None:
    node = Node(tier=FarTier(), num_slots=len(KEYS), max_open_keys=10_000)
    for parent, each in pairwise((b"", *KEYS[:100])):
        node.reserve(Key(each))
        node.commit(Key(each), parent=parent)
    node.writes.end_all()
    node.inbox.clear()
    node.now_s += RECHECK_S + 1
    with patch.object(node.tier, "holds", wraps=node.tier.holds) as holds:
        for number in range(5):
            node.look_up(KEYS[:100], number=number)
            finish(node)

        assert 2 <= holds.call_count <= 12
    assert len(replies(node)[4].offsets) == 100


@given(st.integers(0, 5000), st.integers(0, 10_000))
@settings(deadline=None)
def test_few_pages_stand_for_many_and_others_each_time(count: int, turn: int) -> None:
    chosen = [standing(count, turn + i) for i in range(max(1, count))]

    most = 3 + 1.5 * log2(count + 1)
    assert all(len(each) <= most and set(each) >= {0, count - 1} for each in chosen if count)
    # Each stands for so many that all have had their turn soon.
    soon = {place for each in chosen[: max(1, count // 2)] for place in each}
    assert soon == set(range(count))


def test_with_several_lanes_each_page_in_memory_has_its_turn() -> None:
    """Each lane is asked about its own pages, always in the same order of lanes."""
    even, odd = ([each for each in KEYS if each[0] % 2 == lane][:50] for lane in range(2))
    keys = [each for pair in zip(even, odd, strict=True) for each in pair]
    node = LanedNode(num_slots=128)
    for parent, each in pairwise((b"", *keys)):
        node.reserve(Key(each))
        node.commit(Key(each), parent=parent)
    node.writes.end_all()
    asked: set[Key] = set()
    with patch.object(node.tier, "holds", side_effect=lambda _, key: asked.add(key) or True):
        # One in eight has its turn each time.
        for number in range(400):
            node.now_s += RECHECK_S + 1
            node.look_up(keys, number=number)
            finish(node)
            node.release(number)

    assert asked == set(keys)


def test_of_more_pages_than_may_be_asked_about_at_once_each_has_its_turn() -> None:
    """They are met so seldom that all are old again each time."""
    node = Node(max_write_pages=3)
    for parent, each in pairwise((b"", *KEYS[:24])):
        node.reserve(Key(each))
        node.commit(Key(each), parent=parent)
        node.writes.end_all()
    asked: Counter[Key] = Counter()
    with patch.object(node.tier, "holds", side_effect=lambda _, key: not asked.update([key])):
        for number in range(200):
            node.now_s += RECHECK_S + 1
            node.look_up(KEYS[:24], number=number)
            finish(node)
            node.release(number)

    assert set(asked) == set(KEYS[:24])
    assert asked.total() <= 3 * 200
