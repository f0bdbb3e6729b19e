"""Lookups: what they take from others, and who waits for the slots that they fill."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.parts.node import NAMESPACE, Node, key
from ucm.errors import ProtocolError
from ucm.store.node import protocol as p


def test_a_long_lookup_leaves_threads_and_slots_to_others() -> None:
    """It has a bounded number of reads under way; what is late at its deadline is never begun."""
    node = Node(num_slots=64)
    long, short = [key(i) for i in range(60)], [key(i) for i in range(1000, 1004)]
    node.store(*long, *short)
    node.look_up(long, number=1)
    node.look_up(short, number=2)
    node.reads.end_one()
    node.reads.end_one()  # both are probed

    most = 2 * node.reads.num_threads
    assert node.core.slots.counts().filling <= most + len(short)
    node.now_s += 2
    node.core.tick()
    node.reads.end_all()

    ended = Counter(message.reason for message in node.inbox)  # type: ignore[union-attr]
    assert ended == {"timeout": 2}
    assert node.core.slots.counts().ready <= most + len(short)


def test_a_page_that_waits_behind_one_being_read_is_published_when_that_was_read() -> None:
    """Its parent's slot is being filled, but by a tier read: nobody will commit it."""
    node = Node()
    node.store(key(1))
    node.look_up([key(1)], number=1)
    node.reads.end_one()  # it is probed
    node.reserve(key(2))
    node.commit(key(2), parent=key(1))
    node.writes.end_all()
    assert node.core.queues()["write_pages"] == 1

    node.reads.end_all()
    node.writes.end_all()

    assert node.core.queues()["write_pages"] == 0
    assert node.tier.contains(NAMESPACE, [key(2)]) == 1


def test_pages_that_only_wait_for_a_thread_are_read_in_groups() -> None:
    """Handing over a job costs as much as copying a small page."""
    node = Node(num_slots=512)
    keys = [key(i) for i in range(400)]
    node.store(*keys)
    node.look_up(keys, number=1)

    num_jobs = 0
    while node.reads.jobs:
        node.reads.end_one()
        num_jobs += 1

    (reply,) = node.inbox
    assert len(reply.offsets) == 400  # type: ignore[union-attr]
    assert num_jobs < 100


def test_a_lookup_that_is_not_released_can_not_be_repeated() -> None:
    """Its pins would be lost."""
    node = Node()
    node.store(key(1))
    node.look_up([key(1)], number=1)
    with pytest.raises(ProtocolError, match="lookup 1 was not released"):
        node.look_up([key(1)], number=1)
    node.reads.end_all()
    with pytest.raises(ProtocolError, match="lookup 1 was not released"):
        node.look_up([key(1)], number=1)

    node.core.handle(node.connection, p.Release(lookups=[1]))

    node.look_up([key(1)], number=1)
    assert node.core.slots.counts().pins == 1


def test_without_a_cache_stage_a_page_goes_with_its_last_reader() -> None:
    node = Node(keeps_unpinned=False)
    node.store(key(1))
    node.look_up([key(1)], number=1)
    node.look_up([key(1)], number=2)
    node.reads.end_all()

    node.core.handle(node.connection, p.Release(lookups=[1]))
    assert node.core.slots.counts().ready == 1
    node.core.handle(node.connection, p.Release(lookups=[2]))
    assert node.core.slots.counts().ready == 0

    node.reserve(key(2))
    node.commit(key(2))
    assert node.core.slots.counts().ready == 1
    node.writes.end_all()
    assert node.core.slots.counts().ready == 0


def test_what_was_read_while_the_node_cache_could_not_run_is_not_called_late() -> None:
    node = Node()
    keys = [key(i) for i in range(4)]
    node.store(*keys)
    node.look_up(keys, number=1, timeout_ms=1000)
    node.reads.end_one()  # they are probed
    node.now_s += 5
    node.core.held_up()
    node.core.tick()
    node.reads.end_all()
    (reply,) = node.inbox
    assert isinstance(reply, p.LookupReply)
    assert (len(reply.offsets), reply.reason) == (4, "")


def test_after_the_node_cache_could_not_run_storage_has_no_more_than_a_moment() -> None:
    node = Node()
    node.store(key(1))
    node.look_up([key(1)], number=1, timeout_ms=1000)
    node.now_s += 5
    node.core.held_up()
    node.now_s += 0.5
    node.core.tick()
    (reply,) = node.inbox
    assert isinstance(reply, p.LookupReply)
    assert (len(reply.offsets), reply.reason) == (0, "timeout")


def test_a_prompts_head_that_the_device_serves_outlives_the_documents_behind_it() -> None:
    """Nobody reads it here, and no document is found without it."""
    node = Node(num_slots=8, has_tier=False)
    head, documents, new = [key(1), key(2)], [key(11), key(12), key(13)], [key(21), key(22)]
    for each in [*head, *documents]:
        node.reserve(each)
        node.commit(each)
    for number, document in enumerate(documents):
        node.inbox.clear()
        lookup = p.Lookup(
            id=number, ns=1, keys=[*head, document], read_from=2, load=True, timeout_ms=1000
        )
        node.core.handle(node.connection, lookup)
        (reply,) = node.inbox
        assert len(reply.offsets) == 1  # type: ignore[union-attr]
        node.core.handle(node.connection, p.Release(lookups=[number]))
    node.reserve(*new, *[key(30 + i) for i in range(4)])

    there = {each for each in [*head, *documents] if node.core.slots.find(each) is not None}

    assert there == set(head)
