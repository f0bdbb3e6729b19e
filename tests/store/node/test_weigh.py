"""Lookups of a client that would sooner compute than wait for slow storage."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parts.node import NAMESPACE_MESSAGE, Node, key
from ucm.store.node import protocol as p

KEYS = [key(i) for i in range(40)]


def look_up(node: Node, keys: list[Any], *, number: int = 1, **fields: Any) -> None:
    lookup = p.Lookup(
        id=number, ns=1, keys=list(keys), read_from=0, load=True, timeout_ms=1000, **fields
    )
    node.core.handle(node.connection, lookup)


def replied(node: Node) -> p.LookupReply:
    reply = node.reply()
    assert reply is not None
    node.core.check()
    return reply


def in_memory(node: Node, keys: list[Any]) -> None:
    node.reserve(*keys)
    node.commit(*keys)
    node.inbox.clear()


def test_pages_that_take_longer_to_read_than_to_compute_are_not_read() -> None:
    node = Node()
    node.store(*KEYS)
    look_up(node, KEYS, costs=p.ReadCosts(0.0, 1.5))
    node.reads.end_all()

    reply = replied(node)
    assert (reply.num_stored, reply.refused, reply.reason) == (0, 40, "")
    assert node.core.counters["read_hit"] == 0
    assert node.core.counters["lookup_blocks_refused"] == 40


def test_pages_that_take_less_are_all_read() -> None:
    node = Node()
    node.store(*KEYS)
    look_up(node, KEYS, costs=p.ReadCosts(3.5, 0.9))
    node.reads.end_all()

    reply = replied(node)
    assert (len(reply.offsets), reply.from_files, reply.refused) == (40, 40, 0)


def test_what_lies_in_memory_is_had_whatever_storage_costs() -> None:
    node = Node()
    node.store(*KEYS[6:])
    in_memory(node, KEYS[:6])
    look_up(node, KEYS, costs=p.ReadCosts(0.0, 10.0))
    node.reads.end_all()

    reply = replied(node)
    assert (len(reply.offsets), reply.from_files, reply.refused) == (6, 0, 34)


def test_a_page_that_leads_to_many_in_memory_is_read() -> None:
    node = Node()
    node.store(KEYS[0])
    in_memory(node, KEYS[1:20])
    look_up(node, KEYS[:20], costs=p.ReadCosts(0.0, 10.0))
    node.reads.end_all()

    assert (len(replied(node).offsets), replied(node).refused) == (20, 0)


def test_what_was_never_stored_is_told_from_what_is_not_worth_it() -> None:
    node = Node()
    node.store(*KEYS[:10])
    look_up(node, KEYS, costs=p.ReadCosts(0.0, 2.0))
    node.reads.end_all()

    reply = replied(node)
    assert (reply.num_stored, reply.refused, reply.reason) == (0, 10, "never_stored")


def test_a_few_pages_are_not_worth_the_first_byte_and_many_are() -> None:
    for count, taken in ((4, 0), (40, 40)):
        node = Node()
        node.store(*KEYS[:count])
        look_up(node, KEYS[:count], costs=p.ReadCosts(10.0, 0.5))
        node.reads.end_all()

        assert len(replied(node).offsets) == taken


def test_a_long_prompt_is_found_whole_before_it_is_decided_about() -> None:
    """Storage is asked for more than it could be reading by then."""
    keys = [key(i) for i in range(400)]
    node = Node(num_slots=512)
    node.store(*keys)
    look_up(node, keys, costs=p.ReadCosts(190.0, 0.5))
    node.reads.end_all()

    assert len(replied(node).offsets) == 400


def test_promised_pages_that_slow_storage_brings_are_not_waited_for() -> None:
    """With the first of them it is known that the others come no faster."""
    node = Node()
    node.store(KEYS[0])
    look_up(node, KEYS[:8], promised=8, costs=p.ReadCosts(0.0, 3.0))
    node.reads.end_all()

    assert (replied(node).num_stored, replied(node).refused) == (0, 8)


def test_promised_pages_that_an_engine_of_the_node_brings_are_waited_for() -> None:
    """However long they take to compute, and however slow storage is."""
    node = Node()
    engine = node.other_engine()
    look_up(node, KEYS[:8], promised=8, costs=p.ReadCosts(0.0, 3.0))
    engine.reserve(*KEYS[:8])
    node.reads.end_all()
    assert node.reply() is None
    node.now_s += 0.5
    engine.commit(*KEYS[:8])

    reply = replied(node)
    assert (len(reply.offsets), reply.refused, reply.read_us) == (8, 0, 0)


def test_promised_pages_are_read_as_they_come_if_all_of_them_are_worth_it() -> None:
    node = Node()
    node.store(KEYS[0])
    look_up(node, KEYS[:8], promised=8, costs=p.ReadCosts(3.0, 0.5))
    node.reads.end_all()
    assert node.core.counters["read_hit"] == 1

    node.store(*KEYS[1:8])
    for _ in range(4):
        node.timers.fire()
        node.reads.end_all()

    assert len(replied(node).offsets) == 8


def test_nobody_waits_for_pages_that_are_being_read_slowly_for_others() -> None:
    node = Node()
    node.store(*KEYS[:4])
    node.look_up(KEYS[:4], number=7)
    node.reads.end_one()  # it is probed, and being read
    node.inbox.clear()
    look_up(node, KEYS[:4], costs=p.ReadCosts(0.0, 2.0))

    assert (replied(node).num_stored, replied(node).refused) == (0, 4)


# -- how long storage worked ---------------------------------------------------------------


def test_only_the_time_in_which_pages_are_read_is_told() -> None:
    """Not that of the question whether they are there, nor that in which they are computed."""
    node = Node()
    node.store(KEYS[0])
    look_up(node, KEYS[:2], promised=2)
    node.now_s += 0.25
    node.reads.end_one()  # it is probed
    node.now_s += 0.125
    while node.reads.jobs:
        node.reads.end_one()
    node.now_s += 0.5  # the other is still computed
    node.store(KEYS[1])
    node.timers.fire()
    node.reads.end_one()  # it is looked for
    node.now_s += 0.0625
    node.reads.end_all()

    reply = replied(node)
    assert (reply.from_files, reply.read_us) == (2, 187_500)


def test_lookups_of_one_client_share_the_time_in_which_they_are_read_for() -> None:
    """Ten that take a second together have taken a second."""
    node = Node()
    node.store(*KEYS[:20])
    for number in range(10):
        look_up(node, KEYS[2 * number : 2 * number + 2], number=number)
    for _ in range(10):
        node.reads.end_one()  # they are probed
    num_reads = 0
    while node.reads.jobs:
        num_reads += 1
        node.now_s += 0.0625
        node.reads.end_one()

    replies = [each for each in node.inbox if isinstance(each, p.LookupReply)]
    assert sum(reply.from_files for reply in replies) == 20
    assert sum(reply.read_us for reply in replies) == pytest.approx(num_reads * 62_500, abs=10)


def test_what_another_client_reads_is_not_shared() -> None:
    """Each has its own part of what storage gives, and computes for itself."""
    node = Node()
    node.store(*KEYS[:2])
    other = node.core.connect(
        p.Hello(version=p.VERSION, session="other", role="store", pid=2), lambda message: None
    )
    node.core.handle(other, NAMESPACE_MESSAGE)
    node.writes.end_all()
    node.core.handle(
        other, p.Lookup(id=1, ns=1, keys=[KEYS[1]], read_from=0, load=True, timeout_ms=1000)
    )
    look_up(node, KEYS[:1])
    for _ in range(2):
        node.reads.end_one()
    node.now_s += 0.5
    node.reads.end_all()

    assert replied(node).read_us == 500_000


def test_a_lookup_that_storage_kept_waiting_tells_for_how_long() -> None:
    node = Node()
    node.store(*KEYS[:2])
    look_up(node, KEYS[:2])
    node.reads.end_one()
    node.now_s += 2.0
    node.core.tick()

    reply = replied(node)
    assert (reply.from_files, reply.read_us, reply.reason) == (0, 2_000_000, "timeout")
    node.reads.end_all()
    node.core.check()
