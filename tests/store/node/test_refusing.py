"""What storage is likely to refuse is told when it is to be dumped, before anybody promises it."""

from __future__ import annotations

import pytest

from tests.parts.node import Node, key
from tests.parts.pools import HeldPool
from tests.store.tiers.memory_tier import MemoryTier
from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.tiers.tier import TierNamespace

FULL = TierError("no space left", reason=Outcome.FULL)
FIRST, SECOND, THIRD = ([key(10 * i), key(10 * i + 1)] for i in range(3))


class SmallTier(MemoryTier):
    """Says what room there is."""

    has_room = True

    def check_room(self, namespace: TierNamespace, lane: int) -> None:
        if not self.has_room:
            raise FULL


def fail(pool: HeldPool, node: Node, keys: list[Key]) -> None:
    node.reserve(*keys)
    node.commit(*keys)
    pool.end_all(error=FULL)


def full_store() -> Node:
    tier = SmallTier()
    tier.has_room = False
    return Node(tier=tier)


def test_no_page_is_doubted_while_storage_takes_pages() -> None:
    engine = Node().other_engine()
    engine.reserve(*FIRST)
    assert engine.doubted == []


def test_a_store_that_is_full_when_it_is_opened_is_taken_to_refuse_its_first_page() -> None:
    engine = full_store().other_engine()
    engine.reserve(*FIRST)
    assert engine.doubted == FIRST


def test_storage_that_has_refused_a_page_is_taken_to_refuse_those_of_other_prompts() -> None:
    node = Node()
    fail(node.writes, node, FIRST)
    engine = node.other_engine()
    engine.reserve(*SECOND)
    assert engine.doubted == SECOND


def test_pages_that_are_doubted_are_tried_and_told_to_be_saved() -> None:
    node = full_store()
    engine = node.other_engine()
    engine.reserve(*FIRST)
    engine.commit(*FIRST)
    node.writes.end_all()
    assert engine.saved() == set(FIRST)

    engine.reserve(*SECOND)
    assert engine.doubted == []


def test_pages_that_are_in_memory_already_are_not_doubted_but_what_comes_after_them_is() -> None:
    node = Node()
    engine = node.other_engine()
    engine.reserve(*FIRST)
    engine.commit(*FIRST)
    node.writes.end_all()
    fail(node.writes, node, SECOND)

    engine.reserve(*FIRST)
    assert engine.doubted == []
    engine.reserve(*FIRST, *THIRD)
    assert engine.doubted == THIRD


def test_who_may_not_promise_pages_hears_of_each_what_came_of_it_and_nothing_before() -> None:
    node = full_store()
    reserve = p.Reserve(id=1, ns=1, keys=list(FIRST), parents=[b"", b""])
    node.core.handle(node.connection, reserve)
    (reply,) = node.inbox
    assert isinstance(reply, p.ReserveReply) and reply.doubted_from is None


def test_a_lane_that_hangs_is_taken_to_refuse_until_it_moves_again() -> None:
    node = Node()
    engine = node.other_engine()
    node.writes.stalled = True
    engine.reserve(*FIRST)
    assert engine.doubted == FIRST

    node.writes.stalled = False
    engine.reserve(*SECOND)
    assert engine.doubted == []


@pytest.mark.parametrize("far_has_room", [True, False])
def test_a_page_is_doubted_only_where_near_and_far_refuse(far_has_room: bool) -> None:
    node = Node(has_far=True)
    fail(node.writes, node, FIRST)
    node.far_writes.end_all(error=None if far_has_room else FULL)
    engine = node.other_engine()
    engine.reserve(*SECOND)
    assert engine.doubted == ([] if far_has_room else SECOND)


def test_what_room_there_is_is_looked_at_whenever_an_engine_starts() -> None:
    tier = SmallTier()
    node = Node(tier=tier)
    tier.has_room = False
    engine = node.other_engine()
    node.writes.end_all()
    engine.reserve(*FIRST)
    assert engine.doubted == FIRST
