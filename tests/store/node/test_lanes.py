"""Lookups over storage of two lanes: what is asked on whose behalf."""

from __future__ import annotations

from tests.parts.laned import LanedNode
from tests.parts.node import key
from ucm.store.node import protocol as p

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


def test_pages_are_read_by_the_threads_of_their_own_lane() -> None:
    """Also where threads are busy, and what waits for them is read in groups: pages that follow one
    another are of any lane, and one that hangs must cost its own only."""
    keys = [key(i) for i in range(400)]
    even, odd = ([each for each in keys if each[0] % 2 == lane][:100] for lane in range(2))
    mixed = [each for pair in zip(even, odd, strict=True) for each in pair]
    node = LanedNode(num_slots=256)
    node.store(*mixed)
    node.look_up(mixed, number=1)
    # All that storage is asked for is answered, until both lanes have as many reads as one lookup
    # may have, and pages of both wait for their turn.
    while questions := [job for job in node.reads.jobs if job[0].is_question]:
        for job in questions:
            node.reads.jobs.remove(job)
            job[1](job[0]())

    node.reads.end_all()

    reply = node.reply()
    assert reply is not None and (len(reply.offsets), reply.reason) == (len(mixed), "")


def test_pages_are_written_by_the_threads_of_their_own_lane() -> None:
    node = LanedNode()
    node.reserve(*KEYS)
    node.commit(*KEYS)
    node.writes.end_all()

    node.find(*KEYS, storage=True)
    node.reads.end_all()
    places, _ = node.answer()
    assert all(place & p.IN_STORAGE for place in places)
