"""Finds: each key for itself, memory first, storage in parallel and only as long as it answers."""

from __future__ import annotations

from tests.parts.node import Node, key
from ucm.errors import TierError
from ucm.store.node import protocol as p

BOTH = p.IN_MEMORY | p.IN_STORAGE


def test_each_key_stands_for_itself() -> None:
    """Unlike in a lookup, an absent one hides nothing behind it."""
    node = Node()
    stored = [key(i) for i in range(0, 300, 3)]
    node.store(*stored)

    node.find(*(key(i) for i in range(300)))
    node.reads.end_all()

    places, reason = node.answer()
    assert places == [p.IN_STORAGE if i % 3 == 0 else 0 for i in range(300)]
    assert reason == ""


def test_what_memory_answers_is_not_asked_of_storage() -> None:
    node = Node()
    node.reserve(key(1))
    node.commit(key(1))

    node.find(key(1))

    assert node.reads.jobs == []
    assert node.answer() == ([p.IN_MEMORY | p.QUEUED], "")


def test_a_block_that_is_still_being_filled_is_nowhere() -> None:
    node = Node()
    node.reserve(key(1))

    node.find(key(1))
    node.reads.end_all()

    assert node.answer() == ([0], "")


def test_a_written_page_is_in_storage_once_it_is_published() -> None:
    node = Node()
    node.reserve(key(1))
    node.commit(key(1))
    node.find(key(1), storage=True)
    assert node.answer() == ([p.IN_MEMORY | p.QUEUED], "")

    node.writes.end_all()
    node.find(key(1), storage=True)
    node.reads.end_all()

    assert node.answer() == ([BOTH], "")


def test_a_page_whose_write_failed_is_in_memory_only() -> None:
    node = Node()
    node.reserve(key(1))
    node.commit(key(1))
    node.writes.end_all(TierError("the disk is full", reason="full"))

    node.find(key(1), storage=True)
    node.reads.end_all()

    assert node.answer() == ([p.IN_MEMORY], "")


def test_at_the_deadline_the_rest_is_nowhere() -> None:
    node = Node()
    node.store(key(1), key(2))
    node.reserve(key(3))
    node.commit(key(3))
    node.find(key(1), key(2), key(3))
    node.now_s += 2
    node.core.tick()

    assert node.answer() == ([0, 0, p.IN_MEMORY | p.QUEUED], "timeout")

    node.reads.end_all()
    assert node.inbox == []


def test_storage_that_hangs_is_not_asked_at_all() -> None:
    node = Node()
    node.reads.stalled = True

    node.find(key(1))

    assert node.reads.jobs == []
    assert node.answer() == ([0], "timeout")


def test_storage_that_fails_is_a_reason() -> None:
    node = Node()
    node.find(key(1))

    node.reads.end_all(TierError("the disk is on fire", reason="io_error"))

    assert node.answer() == ([0], "io_error")


def test_a_client_that_has_gone_hears_nothing() -> None:
    node = Node()
    node.find(key(1))
    node.core.closed(node.connection)

    node.reads.end_all()

    assert node.inbox == []
    assert node.core.finds.num_open == 0


def test_a_find_of_nothing_is_answered() -> None:
    node = Node()

    node.find()

    assert node.answer() == ([], "")
