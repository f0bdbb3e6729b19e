"""Lookups over storage of two lanes: what is asked on whose behalf."""

from __future__ import annotations

from tests.store.node.held import key
from tests.store.node.laned import LanedNode

KEYS = [key(i) for i in range(20)]


def test_a_page_that_is_gone_was_evicted_if_a_later_one_of_its_lane_is_there() -> None:
    """Of other lanes nothing is asked on its behalf: they may hang."""
    even, odd = ([each for each in KEYS if each[0] % 2 == lane] for lane in range(2))
    node = LanedNode()
    node.store(even[0], odd[0], odd[1])
    node.expect([even[0], odd[0], even[1], odd[1]])
    for _ in range(3):
        node.reads.end_all()
        node.timers.fire()
    assert node.reply() is None, "what is there is of another lane"
    node.store(even[2])
    node.expect([even[0], odd[0], even[1], even[2], odd[1]], number=2)
    node.reads.end_all()

    reply = node.reply()
    assert reply is not None and (len(reply.offsets), reply.reason) == (2, "evicted")
