"""A promised page that storage fails to bring is asked for again, so often and no longer."""

from __future__ import annotations

import pytest

from tests.parts.node import Node, key
from tests.store.tiers.memory_tier import MemoryTier
from ucm.errors import TierError
from ucm.outcome import Outcome

KEYS = [key(i) for i in range(20)]
FAILS = TierError("the connection broke", reason=Outcome.IO_ERROR)
LATE = TierError("storage hangs: not started in time", reason=Outcome.TIMEOUT)
# The last soon after the one before.
PAUSES = [0.1, 0.2, 0.4, 0.8, 0.1]


class OneByOne(MemoryTier):
    """Each page is a request."""

    is_by_request = True


def reading(*, timeout_ms: int = 5000) -> Node:
    """A node that is about to read the first of the promised pages, which are all there."""
    node = Node(tier=OneByOne())
    node.store(*KEYS)
    node.expect(KEYS, timeout_ms=timeout_ms)
    while node.core.counters["read_hit"] == 0 and not node.core.slots.counts().filling:
        node.reads.end_one()
    return node


def answer(node: Node) -> tuple[int, str]:
    reply = node.reply()
    assert reply is not None
    return len(reply.offsets), reply.reason


def fail_until_the_end(node: Node) -> list[float]:
    """Every call of storage fails. Returns the pauses between them."""
    pauses: list[float] = []
    while node.reply() is None:
        node.reads.end_all(error=FAILS)
        pauses += node.timers.fire()
        node.core.check()
    return pauses


def test_a_read_that_fails_once_costs_nothing_but_a_pause() -> None:
    node = reading()
    node.reads.end(0, error=FAILS)
    node.core.check()
    assert node.timers.fire() == PAUSES[:1]
    node.reads.end_all()

    assert answer(node) == (len(KEYS), "")
    assert node.core.counters["promised_again"] == 1


def test_each_page_of_a_prompt_may_fail_so_often() -> None:
    node = reading()
    for _ in range(len(PAUSES)):
        node.reads.end_all(error=FAILS)
        node.timers.fire()
    node.reads.end_all()

    assert answer(node) == (len(KEYS), "")


def test_while_a_lookup_rests_nothing_is_asked_for_it_and_what_is_under_way_goes_on() -> None:
    node = reading()
    under_way = node.reads.depth
    node.reads.end(0, error=FAILS)
    node.reads.end_all()

    assert node.core.counters["read_hit"] == under_way - 1
    assert node.reads.depth == 0 and node.reply() is None


def test_storage_that_goes_on_failing_is_asked_a_few_times_with_pauses_that_double() -> None:
    node = reading()
    most = node.reads.depth * (len(PAUSES) + 1)

    assert fail_until_the_end(node) == PAUSES
    assert answer(node) == (0, "io_error")
    assert node.core.counters["read_io_error"] <= most


def test_storage_that_stays_away_is_not_waited_for_by_others_until_a_page_has_come() -> None:
    node = reading()
    fail_until_the_end(node)
    node.inbox.clear()

    node.expect(KEYS, number=2)
    assert fail_until_the_end(node) == []
    node.inbox.clear()
    node.expect(KEYS[:1], number=3)
    node.reads.end_all()
    assert answer(node) == (1, "")
    node.inbox.clear()
    node.expect(KEYS[1:], number=4)
    node.reads.end_one()

    assert fail_until_the_end(node) == PAUSES


def test_a_question_about_promised_pages_that_fails_once_is_asked_again() -> None:
    node = Node()
    node.store(*KEYS)
    node.expect(KEYS)
    node.reads.end_all(error=FAILS)
    assert node.reply() is None and node.reads.depth == 0
    assert node.timers.fire() == PAUSES[:1]
    node.reads.end_all()

    assert answer(node) == (len(KEYS), "")


def test_the_pages_before_one_that_never_comes_are_loaded() -> None:
    node = reading()
    for _ in range(len(PAUSES) + 1):
        for job in list(node.reads.jobs):
            place = node.reads.jobs.index(job)
            asks_for_the_fourth = KEYS[3] in getattr(job[0], "args", [[], []])[1]
            node.reads.end(place, error=FAILS if asks_for_the_fourth else None)
        node.timers.fire()
    node.reads.end_all(error=FAILS)

    assert answer(node) == (3, "io_error")


def test_no_pause_ends_after_the_deadline() -> None:
    node = reading(timeout_ms=250)
    node.reads.end_all(error=FAILS)
    assert node.timers.fire() == PAUSES[:1]
    node.now_s = 0.1
    node.reads.end_all(error=FAILS)

    assert answer(node) == (0, "io_error")


def test_who_rests_is_answered_at_the_deadline_with_what_is_there() -> None:
    node = reading()
    node.reads.end(1, error=FAILS)
    node.now_s = 5.1
    node.reads.end_all()
    node.core.tick()

    assert answer(node) == (1, "timeout")
    node.timers.fire()
    assert node.reads.depth == 0


def test_what_was_not_promised_and_what_hangs_is_not_asked_for_again() -> None:
    node = Node()
    node.store(*KEYS)
    node.look_up(KEYS, number=1)
    node.reads.end_one()
    node.reads.end_all(error=FAILS)
    assert answer(node) == (0, "io_error")
    node.inbox.clear()

    node.expect(KEYS, number=2)
    node.reads.end_one()
    node.reads.end_all(error=LATE)
    assert answer(node) == (0, "timeout")
    assert node.core.counters["promised_again"] == 0


def test_who_was_not_promised_a_page_does_not_wait_with_who_was() -> None:
    node = reading()
    node.look_up(KEYS[:1], number=2)
    node.reads.end(0, error=FAILS)
    assert answer(node) == (0, "io_error")
    node.inbox.clear()

    node.timers.fire()
    node.reads.end_all()
    assert answer(node) == (len(KEYS), "")


def test_a_lookup_that_rests_takes_what_another_one_has_brought() -> None:
    node = reading()
    node.reads.end(0, error=FAILS)
    node.reads.end_all()
    node.look_up(KEYS[:1], number=2)
    node.reads.end_all()
    assert answer(node) == (1, "")
    node.inbox.clear()
    node.timers.fire()
    node.reads.end_all()

    assert answer(node) == (len(KEYS), "")
    assert node.core.counters["read_hit"] == len(KEYS)


@pytest.mark.parametrize("near_has_it", [True, False])
def test_with_two_tiers_far_is_asked_before_either_is_asked_again(near_has_it: bool) -> None:
    node = Node(has_far=True)
    (node.store if near_has_it else node.store_far)(KEYS[0])
    node.expect(KEYS[:1])
    while not node.core.slots.counts().filling:
        (node.reads if node.reads.jobs else node.far_reads).end_one()
    node.reads.end_all(error=FAILS if near_has_it else None)
    node.far_reads.end_all(error=None if near_has_it else FAILS)
    assert node.reply() is None
    node.timers.fire()
    node.reads.end_all()
    node.far_reads.end_all()

    assert answer(node) == (1, "")
    assert node.core.counters["promised_again"] == 1
