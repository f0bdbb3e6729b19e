"""The steps of the store API's tasks, driven by hand: no thread, no node cache."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
import pytest

from ucm.errors import TaskFailed
from ucm.outcome import Outcome
from ucm.store.api.buffers import Row
from ucm.store.api.dumps import Shared, dump
from ucm.store.api.loads import find, load, prefetch
from ucm.store.api.open_blocks import OpenBlocks
from ucm.store.api.pages import Pages, Part
from ucm.store.api.questions import Questions
from ucm.store.api.steps import Ask, Hear, Need, NodeLost, Pause, ReserveTurn, Steps, Tell, TurnOver
from ucm.store.api.unsaved import Unsaved
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p

KEYS = [Key(bytes([i]) * 32) for i in range(5)]
PAGE = 64


class Memory(Pages):
    """Pages in memory of this test."""

    def __init__(self) -> None:
        super().__init__(shard_bytes=PAGE)
        self.bytes = np.zeros(len(KEYS) * PAGE, np.uint8)

    def shard_address(self, offset: int, shard: int) -> int:
        return int(self.bytes.ctypes.data) + offset + shard * PAGE


class Seen(Row):
    """A user's memory that notes when it is copied, and may refuse."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.copies = 0
        self._refuses = refuses

    def load_from(self, address: int) -> None:
        if self._refuses:
            raise RuntimeError("the device is gone")
        self.copies += 1

    dump_to = load_from


def questions() -> Questions:
    return Questions(itertools.count(1).__next__, time.monotonic() + 60)


def parts_of(keys: Sequence[Key], rows: Sequence[Row], shard: int = 0) -> list[Part]:
    return [Part(bytes(k[:1]), k, shard, row) for k, row in zip(keys, rows, strict=True)]


def go_on(steps: Steps[object], *answers: object) -> list[Need]:
    """What it yields until it waits, once it has what it waited for."""
    value: object = answers[0] if answers else None
    needs: list[Need] = []
    while True:
        needs.append(need := steps.send(value))
        if isinstance(need, (Hear, Pause, ReserveTurn)):
            return needs
        value = need.question.id if isinstance(need, Ask) else None


def end_of(steps: Steps[object], answer: object = None) -> tuple[object, list[Need]]:
    """Its result, and what it yields before."""
    needs: list[Need] = []
    try:
        while True:
            needs.append(steps.send(answer if not needs else None))
    except StopIteration as end:
        return end.value, needs


def asked(needs: Sequence[Need]) -> list[list[bytes]]:
    return [need.question.keys for need in needs if isinstance(need, Ask)]


def pages(number: int, *offsets: int, reason: Outcome = Outcome.FINE) -> p.LookupReply:
    return p.LookupReply(
        id=number,
        offsets=list(offsets),
        num_stored=len(offsets),
        from_files=0,
        head_stored=0,
        reason=reason,
    )


def test_a_load_asks_two_batches_ahead_and_gives_each_back_when_it_is_copied() -> None:
    rows = [Seen() for _ in KEYS]
    steps = load(questions(), parts_of(KEYS, rows), batch=2, pages=Memory(), log_path="log")

    assert asked(go_on(steps)) == [KEYS[:2], KEYS[2:4]]
    needs = go_on(steps, pages(2, 0, 64))

    assert [row.copies for row in rows] == [0, 0, 1, 1, 0]
    assert needs[0] == Tell(p.Release(lookups=[2]))
    assert asked(needs) == [KEYS[4:]]
    go_on(steps, pages(1, 0, 64))
    end_of(steps, pages(3, 0))
    assert [row.copies for row in rows] == [1] * 5


def test_a_load_asks_the_next_node_cache_for_what_it_has_not_copied() -> None:
    rows = [Seen() for _ in KEYS]
    steps = load(questions(), parts_of(KEYS, rows), batch=2, pages=Memory(), log_path="log")
    go_on(steps)
    go_on(steps, pages(1, 0, 64))

    needs = [steps.throw(NodeLost()), *go_on(steps)]

    assert asked(needs) == [KEYS[2:4], KEYS[4:]]


def test_a_load_that_finds_no_room_hears_what_it_has_asked_before_it_pauses() -> None:
    rows = [Seen() for _ in KEYS]
    steps = load(questions(), parts_of(KEYS, rows), batch=2, pages=Memory(), log_path="log")
    go_on(steps)
    why = "room in the node cache: raise cache_buffer_capacity_gb"

    needs = go_on(steps, pages(1, 0, reason=Outcome.NO_ROOM))
    assert (asked(needs), needs[-1]) == ([], Hear(why))
    needs = go_on(steps, pages(2, reason=Outcome.NO_ROOM))
    assert isinstance(needs[-1], Pause)
    assert needs[-1].waits_for == why
    needs = go_on(steps)
    assert (asked(needs), needs[-1]) == ([KEYS[2:4], [KEYS[1]]], Hear("storage"))


def test_a_load_whose_copy_fails_gives_its_pages_back_first() -> None:
    steps = load(
        questions(), parts_of(KEYS[:1], [Seen(refuses=True)]), batch=2, pages=Memory(), log_path=""
    )
    go_on(steps)

    assert steps.send(pages(1, 0)) == Tell(p.Release(lookups=[1]))
    with pytest.raises(TaskFailed, match="a copy failed: RuntimeError: the device is gone"):
        next(steps)


def test_a_find_asks_each_node_cache_until_one_has_answered() -> None:
    steps = find(questions(), KEYS, storage=True)
    go_on(steps)

    needs = [steps.throw(NodeLost()), *go_on(steps)]
    assert asked(needs) == [KEYS]
    found = p.Found(id=2, places=bytes(5), reason=Outcome.FINE)
    assert end_of(steps, found) == (found, [])


def test_a_prefetch_brings_what_only_storage_has() -> None:
    steps = prefetch(questions(), KEYS, batch=8, max_blocks=2)
    go_on(steps)
    places = bytes(
        [0, p.IN_STORAGE, p.IN_STORAGE | p.IN_MEMORY, p.IN_STORAGE, p.IN_STORAGE | p.QUEUED]
    )

    needs = go_on(steps, p.Found(id=1, places=places, reason=Outcome.FINE))

    assert asked(needs) == [[KEYS[1], KEYS[3]]]


# -- dumps ---------------------------------------------------------------------------------


def shared(num_shards: int = 1) -> Shared:
    return Shared(Memory(), OpenBlocks(num_shards=num_shards, timeout_s=60.0), Unsaved())


def slots(number: int, *offsets: int) -> p.ReserveReply:
    return p.ReserveReply(id=number, offsets=list(offsets))


def test_a_dump_reserves_in_its_turn_commits_what_is_whole_and_verifies_at_last() -> None:
    rows = [Seen() for _ in KEYS[:2]]
    of = shared()
    steps = dump(questions(), parts_of(KEYS[:2], rows), batch=8, shared=of)
    assert go_on(steps) == [ReserveTurn()]
    go_on(steps)  # it may be its turn already
    assert asked(go_on(steps)) == [KEYS[:2]]

    needs = go_on(steps, slots(1, 0, p.HAVE))

    assert [row.copies for row in rows] == [1, 0]
    commit, turn_over, verify, hear = needs
    assert commit == Tell(p.Commit(ns=1, keys=[KEYS[0]], parents=[b""]))
    assert turn_over == TurnOver()
    assert asked([verify]) == [[KEYS[1]]]
    assert hear == Hear("another client, which is dumping the same block")
    end_of(steps, p.Found(id=2, places=bytes([p.IN_MEMORY]), reason=Outcome.FINE))
    assert (list(of.unsaved.all()), list(of.blocks)) == (KEYS[:2], [])


def begun_dump(of: Shared, keys: list[Key], rows: Sequence[Row], shard: int = 0) -> Steps[object]:
    steps = dump(questions(), parts_of(keys, rows, shard), batch=8, shared=of)
    go_on(steps)
    go_on(steps)
    return steps


def test_a_dump_that_is_lost_with_the_node_cache_fails_unless_it_had_not_begun() -> None:
    waiting = dump(questions(), parts_of(KEYS[:1], [Seen()]), batch=8, shared=shared())
    go_on(waiting)
    assert waiting.throw(NodeLost()) == ReserveTurn()

    begun = begun_dump(shared(), KEYS[:1], [Seen()])
    go_on(begun)
    with pytest.raises(TaskFailed, match="the node cache was lost during the dump"):
        begun.throw(NodeLost())


def test_slots_that_come_after_the_end_of_a_dump_are_given_back() -> None:
    ask, _ = go_on(begun_dump(shared(), KEYS[:3], [Seen()] * 3))

    assert isinstance(ask, Ask)
    assert ask.undo(slots(1, 64, p.HAVE, p.NO_ROOM)) == p.Abort(ns=1, keys=[KEYS[0]])
    assert ask.undo(slots(1, p.NO_ROOM, p.HAVE, p.NO_ROOM)) is None


def test_a_dump_asks_again_for_the_blocks_that_there_was_no_room_for() -> None:
    rows = [Seen(), Seen()]
    steps = begun_dump(shared(), KEYS[:2], rows)
    go_on(steps)

    needs = go_on(steps, slots(1, 0, p.NO_ROOM))

    assert [row.copies for row in rows] == [1, 0]
    assert isinstance(needs[-1], Pause)
    assert needs[-1].waits_for == "room in the node cache: storage is slow, or the cache is small"
    assert go_on(steps) == [ReserveTurn()]
    assert asked(go_on(steps)) == [[KEYS[1]]]


def test_a_dump_whose_copy_fails_commits_the_blocks_before_it() -> None:
    steps = begun_dump(shared(), KEYS[:2], [Seen(), Seen(refuses=True)])
    go_on(steps)

    assert steps.send(slots(1, 0, 64)) == Tell(p.Commit(ns=1, keys=[KEYS[0]], parents=[b""]))
    with pytest.raises(TaskFailed, match="a copy failed: RuntimeError: the device is gone"):
        next(steps)


def test_a_block_that_is_broken_takes_no_more_shards_but_may_be_started_over() -> None:
    of = shared(num_shards=2)
    steps = begun_dump(of, KEYS[:1], [Seen()])
    go_on(steps)
    go_on(steps, slots(1, 0))
    of.blocks.node_lost()

    with pytest.raises(TaskFailed, match="can't be completed: the node cache was lost"):
        go_on(begun_dump(of, KEYS[:1], [Seen()], shard=1))
    assert asked(go_on(begun_dump(of, KEYS[:1], [Seen()]))) == [[KEYS[0]]]


def test_a_whole_block_that_nobody_has_completed_is_dumped_once_more() -> None:
    row = Seen()
    steps = begun_dump(shared(), KEYS[:1], [row])
    go_on(steps)
    go_on(steps, slots(1, p.HAVE))

    absent = p.Found(id=2, places=b"\0", reason=Outcome.FINE)
    assert isinstance(go_on(steps, absent)[-1], Pause)
    assert go_on(steps) == [ReserveTurn()]
    assert asked(go_on(steps)) == [[KEYS[0]]]
    go_on(steps, slots(3, 0))
    assert row.copies == 1
