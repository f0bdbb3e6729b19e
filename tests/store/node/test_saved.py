"""READY is not SAVED: what was accepted is written or told, and what is met unsaved is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.parts.node import NAMESPACE, Node, key
from ucm.errors import TierError
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.saved import SavedBook, SavingRules

FULL = TierError("no space left", reason="full")
KEYS = [key(i) for i in range(4)]


def is_in_storage(node: Node, *keys: Key) -> list[bool]:
    return [node.tier.contains(NAMESPACE, [each]) == 1 for each in keys]


def dump(node: Node, keys: list[Key]) -> list[int]:
    """As one prompt. Returns what was answered."""
    parents = [b"", *keys[:-1]]
    node.core.handle(node.connection, p.Reserve(id=1, ns=1, keys=list(keys), parents=parents))
    (reply,) = [message for message in node.inbox if isinstance(message, p.ReserveReply)]
    node.inbox.remove(reply)
    node.core.handle(node.connection, p.Commit(ns=1, keys=list(keys), parents=parents))
    return reply.offsets


def by_lookup(node: Node) -> None:
    node.look_up(KEYS, number=7)
    node.reads.end_all()
    node.release(7)


def by_lookup_of_what_the_device_has(node: Node) -> None:
    node.core.handle(
        node.connection,
        p.Lookup(id=8, ns=1, keys=list(KEYS), read_from=4, load=True, timeout_ms=1000),
    )
    node.reads.end_all()


def by_dump(node: Node) -> None:
    assert dump(node, KEYS) == [p.HAVE] * 4


@pytest.mark.parametrize("meet", [by_lookup, by_lookup_of_what_the_device_has, by_dump])
def test_what_storage_refused_is_written_when_it_is_met_again(
    meet: Callable[[Node], None],
) -> None:
    node = Node()
    dump(node, KEYS)
    node.writes.end_all(FULL)
    assert node.told() == dict.fromkeys(KEYS, "full")

    node.now_s += 2
    meet(node)
    node.writes.end_all()

    assert is_in_storage(node, *KEYS) == [True] * 4
    assert node.told() == {}


@pytest.mark.parametrize("meet", [by_lookup, by_lookup_of_what_the_device_has, by_dump])
def test_what_storage_has_just_refused_is_said_to_whoever_counts_on_it(
    meet: Callable[[Node], None],
) -> None:
    node = Node()
    dump(node, KEYS)
    node.writes.end_all(FULL)
    node.inbox.clear()

    meet(node)

    assert list(node.told()) == KEYS
    assert node.writes.jobs == []


@pytest.mark.parametrize("meet", [by_lookup, by_lookup_of_what_the_device_has, by_dump])
def test_files_that_were_removed_are_written_again_from_memory(
    meet: Callable[[Node], None],
) -> None:
    node = Node()
    dump(node, KEYS)
    node.writes.end_all()
    node.tier._pages.clear()
    node.now_s += 11

    meet(node)
    node.reads.end_all()
    node.writes.end_all()

    assert is_in_storage(node, *KEYS) == [True] * 4
    assert node.core.counters["saved_page_gone"] == 4


def test_what_can_not_be_looked_at_again_is_not_promised() -> None:
    node = Node()
    dump(node, KEYS)
    node.writes.end_all()
    node.now_s += 11
    node.look_up(KEYS, number=1)

    node.reads.end_all(TierError("the mount is gone", reason="io_error"))

    assert node.told() == dict.fromkeys(KEYS, "io_error")


def test_what_was_seen_a_moment_ago_is_not_looked_at_again() -> None:
    node = Node()
    dump(node, KEYS)
    node.writes.end_all()
    node.now_s += 9

    for number in range(100, 120):
        node.look_up(KEYS, number=number)

    assert node.reads.jobs == [] and node.writes.jobs == []


def test_no_more_pages_are_looked_at_again_than_the_queue_has_places() -> None:
    node = Node(max_write_pages=3)
    for i in range(0, 12, 3):
        dump(node, [key(j) for j in range(i, i + 3)])
        node.writes.end_all()
    node.now_s += 11

    node.look_up([key(i) for i in range(12)], number=1)

    assert len(node.reads.jobs) == 1
    node.reads.end_all()
    node.look_up([key(i) for i in range(12)], number=2)
    assert len(node.reads.jobs) == 1


def test_who_counts_on_a_page_that_another_engine_gives_up_is_told() -> None:
    node = Node()
    other = node.other_engine()
    other.reserve(KEYS[0])
    assert dump(node, KEYS[:1]) == [p.HAVE]

    other.abort(KEYS[0])

    assert node.told() == {KEYS[0]: "aborted"}


def test_a_find_in_storage_believes_storage_only() -> None:
    node = Node()
    dump(node, KEYS)
    node.writes.end_all()
    node.tier._pages.clear()

    node.find(*KEYS, storage=True)
    node.reads.end_all()

    assert node.answer() == ([p.IN_MEMORY | p.QUEUED] * 4, "")
    node.writes.end_all()
    node.find(*KEYS, storage=True)
    node.reads.end_all()
    assert node.answer() == ([p.IN_MEMORY | p.IN_STORAGE] * 4, "")


# -- places ------------------------------------------------------------------------------------

STEP = st.sampled_from(["dump", "write", "fail", "look_up", "later", "abort", "remove"])


@given(st.lists(st.tuples(STEP, st.integers(0, 30)), max_size=60))
def test_every_page_that_was_accepted_is_in_storage_or_was_told(
    steps: list[tuple[str, int]],
) -> None:
    """Whatever the order of writes, failures and removals, at the end nobody counts in vain on
    what nobody removed since it was seen."""
    node = Node(max_write_pages=5, num_slots=64)
    accepted: set[Key] = set()
    removed: set[Key] = set()
    for number, (step, n) in enumerate(steps):
        if step == "dump":
            keys = [key(100 * n + i) for i in range(n % 4 + 1)]
            offsets = dump(node, keys)
            accepted |= {k for k, offset in zip(keys, offsets, strict=True) if offset >= 0}
        elif step == "abort":
            keys = [key(100 * n + 50)]
            reserve = p.Reserve(id=1, ns=1, keys=list(keys), parents=[b""])
            node.core.handle(node.connection, reserve)
            node.inbox.pop()
            node.core.handle(node.connection, p.Abort(ns=1, keys=list(keys)))
        elif step in ("write", "fail") and node.writes.jobs:
            node.writes.end(n, error=FULL if step == "fail" else None)
        elif step == "look_up":
            node.look_up([key(100 * n + i) for i in range(3)], number=1000 + number)
            node.reads.end_all()
        elif step == "later":
            node.now_s += n
        elif step == "remove" and node.tier._pages:
            _, gone = list(node.tier._pages)[n % len(node.tier._pages)]
            del node.tier._pages[NAMESPACE.fingerprint, gone]
            removed.add(gone)
        assert node.core.queues()["write_pages"] <= 5
    node.reads.end_all()
    node.writes.end_all()

    told = node.told()
    for each in accepted - removed:
        assert is_in_storage(node, each) == [True] or each in told
        assert not (is_in_storage(node, each) == [True] and each in told)
    node.core.check()
    assert node.core.queues()["write_pages"] == 0


def test_a_batch_is_given_as_many_slots_as_the_queue_has_places_and_all_of_them_are_written() -> (
    None
):
    node = Node(max_write_pages=5)
    keys = [key(i) for i in range(12)]

    offsets = dump(node, keys)

    assert [offset >= 0 for offset in offsets] == [True] * 5 + [False] * 7
    node.writes.end_all()
    assert is_in_storage(node, *keys) == [True] * 5 + [False] * 7
    assert node.told() == {}


def test_a_place_whose_slot_is_given_up_is_free_again() -> None:
    node = Node(max_write_pages=2)
    for _ in range(3):
        node.reserve(*KEYS[:2])
        node.core.handle(node.connection, p.Abort(ns=1, keys=list(KEYS[:2])))
    other = node.other_engine()
    other.reserve(*KEYS[:2])
    other.die()

    assert all(offset >= 0 for offset in dump(node, KEYS[:2]))


# -- the book ----------------------------------------------------------------------------------


def test_what_was_refused_is_left_alone_for_a_while_and_then_tried_again() -> None:
    now_s = 0.0
    book = SavedBook(SavingRules(recheck_s=10, retry_s=1), lambda: now_s)
    book.note_refused(KEYS[0], "full")
    assert not book.may_retry(KEYS[0])
    now_s = 1.0
    assert book.may_retry(KEYS[0])
    assert book.note_saved(KEYS[0])
    assert not book.note_saved(KEYS[0])


def test_the_memory_of_what_was_seen_is_bounded_in_number_and_in_time() -> None:
    now_s = 0.0
    book = SavedBook(SavingRules(recheck_s=10, retry_s=1), lambda: now_s)
    for i in range((1 << 16) + 1):
        book.note_saved(key(i))
    assert not book.was_saved(key(0))
    assert book.is_saved(key(1))
    now_s = 10.1
    assert book.was_saved(key(1))
    assert not book.is_saved(key(1))


@pytest.mark.parametrize("meet", [by_lookup, by_lookup_of_what_the_device_has, by_dump])
def test_what_this_node_has_reclaimed_is_served_from_memory_and_written_again_when_it_is_met(
    meet: Callable[[Node], None],
) -> None:
    """At once: nobody waits until it would be looked at again, and no receipt promises it."""
    node = Node()
    dump(node, KEYS)
    node.writes.end_all()
    for each in KEYS:
        del node.tier._pages[NAMESPACE.fingerprint, each]
    node.core.removed_from_storage(KEYS)

    meet(node)
    node.writes.end_all()

    assert is_in_storage(node, *KEYS) == [True] * 4
    assert node.told() == {}
