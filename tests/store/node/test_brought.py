"""How many of its pages a lookup has brought itself."""

from __future__ import annotations

from tests.parts.node import Node, key
from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.node import protocol as p

KEYS = [key(i) for i in range(6)]


def replies(node: Node) -> dict[int, p.LookupReply]:
    return {each.id: each for each in node.inbox if isinstance(each, p.LookupReply)}


def test_what_was_there_was_not_brought() -> None:
    node = Node()
    node.store(*KEYS)
    node.look_up(KEYS[:2], number=1)
    node.reads.end_all()
    node.look_up(KEYS, number=2)
    node.reads.end_all()

    assert [replies(node)[number].brought for number in (1, 2)] == [2, 4]


def test_what_lies_behind_a_page_that_can_not_be_had_does_not_count() -> None:
    node = Node()
    node.store(*KEYS)
    node.look_up(KEYS[:2], number=1)
    node.reads.end_all()
    node.look_up(KEYS, number=2)
    node.reads.end_one()  # the question
    while len(node.reads.jobs) > 1:
        node.reads.end(len(node.reads.jobs) - 1)
    node.reads.end(0, error=TierError("io", reason=Outcome.IO_ERROR))
    node.reads.end_all()

    reply = replies(node)[2]
    assert (len(reply.offsets), reply.brought, reply.reason) == (2, 0, "io_error")
    node.core.check()


def test_of_two_lookups_at_once_one_has_brought_each_page() -> None:
    node = Node()
    node.store(*KEYS)
    node.look_up(KEYS[:4], number=1)
    node.look_up(KEYS, number=2)
    node.reads.end_all()

    assert [len(each.offsets) for each in replies(node).values()] == [4, 6]
    assert sum(each.brought for each in replies(node).values()) == 6
