"""What jobs do when all is not there, or does not fit: their steps, driven by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.store.api.test_steps import KEYS, PAGE, Memory, asked, end_of, go_on, pages, questions
from ucm.integration.tiering.transfers import PlacedRow, RowJob, load, promised, store
from ucm.outcome import Outcome
from ucm.store.api.steps import Hear, Need, NodeLost, Pause, Tell
from ucm.store.node import protocol as p

NO_ROOM, HAVE = p.NO_ROOM, p.HAVE


class Rows:
    """One for each key, all of whose bytes are its number, from 1."""

    def __init__(self) -> None:
        self.host = np.repeat(np.arange(1, len(KEYS) + 1, dtype=np.uint8), PAGE)
        start = int(self.host.ctypes.data)
        parents = [b"", *KEYS[:-1]]
        self.job = RowJob(
            [PlacedRow(key, start + i * PAGE, parents[i]) for i, key in enumerate(KEYS)]
        )
        self.memory = Memory()
        self.memory.capacity_bytes = 4 * 2 * PAGE  # for two rows at once

    def __getitem__(self, row: int) -> int:
        return int(self.host[row * PAGE])


def slots(number: int, *offsets: int) -> p.ReserveReply:
    return p.ReserveReply(id=number, offsets=list(offsets))


def commits(needs: Sequence[Need]) -> list[list[bytes]]:
    told = [need.message for need in needs if isinstance(need, Tell)]
    return [message.keys for message in told if isinstance(message, p.Commit)]


def test_a_load_leaves_out_what_can_t_be_had_and_asks_two_batches_ahead() -> None:
    rows = Rows()
    rows.host[:] = 0
    rows.memory.bytes[:] = 7
    steps = load(questions(), rows.job, pages=rows.memory, row_bytes=PAGE)
    assert asked(go_on(steps)) == [KEYS[:2], KEYS[2:4]]

    assert asked(go_on(steps, pages(1, reason=Outcome.CORRUPT))) == [[KEYS[1]]]
    assert asked(go_on(steps, pages(2, 0, reason=Outcome.EVICTED))) == [[KEYS[4]]]
    go_on(steps, pages(3, 0))
    end_of(steps, pages(4, 0))

    assert [rows[i] for i in range(5)] == [0, 7, 7, 0, 7]
    assert rows.job.done == {KEYS[1], KEYS[2], KEYS[4]} and not rows.job.is_whole
    assert rows.job.reasons == {KEYS[0]: Outcome.CORRUPT, KEYS[3]: Outcome.EVICTED}


def test_a_store_goes_on_with_what_a_full_node_cache_had_no_room_for() -> None:
    rows = Rows()
    steps = store(questions(), rows.job, pages=rows.memory, row_bytes=PAGE)
    assert asked(go_on(steps)) == [KEYS[:2]]

    needs = go_on(steps, slots(1, 0, NO_ROOM))
    assert commits(needs) == [[KEYS[0]]]
    assert isinstance(needs[-1], Pause) and rows.job.done == {KEYS[0]}
    assert rows.memory.bytes[0] == 1
    assert asked(go_on(steps)) == [KEYS[1:3]]
    assert asked(go_on(steps, slots(2, 64, 128))) == [KEYS[3:]]
    _, needs = end_of(steps, slots(3, 192, 256))

    assert commits(needs) == [KEYS[3:]] and rows.job.is_whole
    assert [rows.memory.bytes[i * PAGE] for i in range(5)] == [1, 2, 3, 4, 5]


def test_a_row_that_another_client_began_and_has_not_stored_is_stored_after_all() -> None:
    rows = Rows()
    steps = store(questions(), rows.job, pages=rows.memory, row_bytes=PAGE)
    go_on(steps)
    go_on(steps, slots(1, HAVE, HAVE))
    go_on(steps, slots(2, 0, 64))
    needs = go_on(steps, slots(3, 128))
    assert asked(needs) == [KEYS[:2]], "are they there?"
    assert needs[-1] == Hear("another client, which is storing the same row")

    needs = go_on(steps, p.Found(id=4, places=bytes([p.IN_MEMORY, 0]), reason=Outcome.FINE))
    assert isinstance(needs[-1], Pause)
    assert rows.job.done == {KEYS[0], *KEYS[2:]}
    assert asked(go_on(steps)) == [[KEYS[1]]]
    end_of(steps, slots(5, 192))
    assert rows.job.is_whole


def test_a_store_gives_the_next_node_cache_what_it_has_not_stored() -> None:
    rows = Rows()
    steps = store(questions(), rows.job, pages=rows.memory, row_bytes=PAGE)
    go_on(steps)
    go_on(steps, slots(1, 0, 64))

    assert asked([steps.throw(NodeLost()), *go_on(steps)]) == [KEYS[2:4]]


def test_a_promise_is_waited_for_at_the_next_node_cache_too() -> None:
    steps = promised(questions(), KEYS)
    go_on(steps)
    assert asked([steps.throw(NodeLost()), *go_on(steps)]) == [KEYS]

    found, needs = end_of(steps, pages(2, 0, reason=Outcome.TIMEOUT))
    assert found is Outcome.TIMEOUT
    assert needs == [Tell(p.Release(lookups=[2]))], "what has come is not held"
