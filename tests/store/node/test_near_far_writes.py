"""Two tiers behind one memory: what is written where, what is dropped, and what is told of both."""

from __future__ import annotations

from tests.parts.node import NAMESPACE, Node, key
from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.node import protocol as p

KEYS = [key(i) for i in range(6)]
FULL = TierError("no space left", reason=Outcome.FULL)
GONE = TierError("can't connect", reason=Outcome.IO_ERROR)
ALL = p.IN_MEMORY | p.IN_STORAGE | p.IN_NEAR | p.IN_FAR


def near_far(**changes: int) -> Node:
    return Node(has_far=True, **changes)


def dump(node: Node, *keys: bytes) -> None:
    """One prompt."""
    node.reserve(*keys)
    for each, parent in zip(keys, [b"", *keys[:-1]], strict=True):
        node.commit(each, parent=parent)


# -- writing ---------------------------------------------------------------------------------


def test_what_is_dumped_is_written_to_both_each_in_its_own_order() -> None:
    node = near_far()
    dump(node, *KEYS)
    node.writes.end_all()
    assert node.tier.contains(NAMESPACE, KEYS) == len(KEYS)
    assert node.far.contains(NAMESPACE, KEYS) == 0
    # The last is staged first, and waits for the others.
    while node.far_writes.jobs:
        node.far_writes.end(-1)
        stored = [node.far.contains(NAMESPACE, [each]) == 1 for each in KEYS]
        assert stored == sorted(stored, reverse=True)

    assert all(stored)
    assert node.core.slots.counts().pins == 0


def test_far_keeps_a_page_in_memory_until_it_has_it() -> None:
    node = near_far(num_slots=16)
    dump(node, *KEYS[:2])
    node.writes.end_all()
    for i in range(100, 140):
        dump(node, key(i))
        node.writes.end_all()
    assert node.core.slots.find(KEYS[0]) is not None

    node.far_writes.end_all()
    assert node.far.contains(NAMESPACE, KEYS[:2]) == 2


def test_what_far_has_no_room_for_is_dropped_counted_and_kept_near() -> None:
    node = near_far(num_slots=32)
    keys = [key(i) for i in range(20)]
    dump(node, *keys)
    node.writes.end_all()

    assert node.tier.contains(NAMESPACE, keys) == len(keys)
    assert node.core.queues()["far_write_pages"] == 8  # a quarter of the memory
    counters = node.core.counters
    assert (
        counters["far_dump_dropped_queue_full"] + counters["far_dump_dropped_after_failed"]
        == len(keys) - 8
    )
    assert node.told() == {}


def test_what_far_dropped_is_written_when_it_is_met_again() -> None:
    node = near_far(num_slots=32)
    keys = [key(i) for i in range(10)]
    dump(node, *keys)
    node.writes.end_all()
    node.far_writes.end_all()
    assert node.far.contains(NAMESPACE, keys) == 8
    node.now_s += 2

    node.look_up(keys, number=1)
    node.far_writes.end_all()

    assert node.far.contains(NAMESPACE, keys) == len(keys)


def test_a_page_that_near_refuses_is_kept_as_long_as_far_may_have_it() -> None:
    node = near_far()
    dump(node, KEYS[0])
    node.writes.end_all(error=FULL)
    assert node.told() == {}
    node.far_writes.end_all()

    assert node.told() == {}


def test_a_page_that_both_refuse_is_told_whoever_is_last() -> None:
    for last in ("near", "far"):
        node = near_far()
        dump(node, KEYS[0])
        order = [(node.far_writes, GONE), (node.writes, FULL)]
        for pool, error in order if last == "near" else reversed(order):
            assert node.told() == {}
            pool.end_all(error=error)

        assert list(node.told()) == [KEYS[0]]


def test_a_page_that_only_far_refuses_is_tried_again_and_nobody_is_told() -> None:
    node = near_far()
    dump(node, KEYS[0])
    node.writes.end_all()
    node.far_writes.end_all(error=GONE)
    assert node.told() == {}
    node.now_s += 2
    node.core.tick()
    node.far_writes.end_all()

    assert node.far.contains(NAMESPACE, KEYS[:1]) == 1


def test_a_page_that_is_read_near_is_looked_for_far_a_while_later() -> None:
    """Who wrote it near was killed before far had it."""
    node = near_far()
    node.store(*KEYS)
    node.look_up(KEYS, number=1)
    node.reads.end_all()
    assert not node.far_reads.jobs and not node.far_writes.jobs
    node.release(1)
    node.now_s += 61

    for number in (2, 3):
        node.look_up(KEYS, number=number)
        node.reads.end_all()
        node.far_reads.end_all()
        node.far_writes.end_all()

    assert node.far.contains(NAMESPACE, KEYS) == len(KEYS)


# -- in storage ------------------------------------------------------------------------------


def test_in_storage_is_what_both_have() -> None:
    node = near_far()
    dump(node, KEYS[0])
    node.writes.end_all()
    node.find(KEYS[0], storage=True)
    assert node.answer() == ([p.IN_MEMORY | p.QUEUED | p.IN_NEAR], "")
    node.far_writes.end_all()
    node.find(KEYS[0], storage=True)
    node.reads.end_all()
    node.far_reads.end_all()

    assert node.answer() == ([ALL], "")


def test_what_far_can_not_tell_is_not_in_storage() -> None:
    node = near_far()
    dump(node, KEYS[0])
    node.writes.end_all()
    node.far_writes.end_all(error=GONE)
    node.find(KEYS[0], storage=True)
    node.reads.end_all()
    node.far_reads.end_all(error=GONE)

    assert node.answer() == ([p.IN_MEMORY | p.IN_NEAR], "io_error")


def test_a_page_is_found_in_either() -> None:
    node = near_far()
    node.store(KEYS[0])
    node.store_far(KEYS[1])
    node.find(*KEYS[:3])
    node.reads.end_all()
    node.far_reads.end_all()

    assert node.answer() == ([p.IN_STORAGE, p.IN_STORAGE, 0], "")
