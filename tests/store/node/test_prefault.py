"""Memory is taken when nobody waits, once, and every rank hears of all that is in use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.prefault import MemoryAhead
from ucm.store.node.slots import SlotTable

EXTENT_BYTES = 32 << 20
NUM_EXTENTS = 16
SLOT_BYTES = 16 << 20
MOVES = ["reserve", "tick", "wait", "busy", "done"]


class Node:
    def __init__(self, *, up_to_extents: int) -> None:
        self.now_s = 0.0
        self.slots = SlotTable(NUM_EXTENTS * EXTENT_BYTES, extent_bytes=EXTENT_BYTES)
        self.taken: list[range] = []
        self.under_way: list[Callable[[], None]] = []
        self.announced: list[p.MemoryInUse] = []
        self.ahead = MemoryAhead(
            self.slots,
            up_to_bytes=up_to_extents * EXTENT_BYTES,
            populate=self.populate,
            announce=self.announced.append,
            clock=lambda: self.now_s,
        )
        self.num_keys = 0

    def populate(self, offset: int, nbytes: int, on_done: Callable[[], None]) -> None:
        self.taken.append(extents(offset, nbytes))
        self.under_way.append(on_done)

    def move(self, move: str) -> None:
        if move == "reserve":
            self.num_keys += 1
            self.slots.reserve(Key(self.num_keys.to_bytes(32, "big")), SLOT_BYTES)
        elif move == "tick":
            self.ahead.tick()
        elif move == "wait":
            self.now_s += 1.0
        elif move == "busy":
            self.ahead.is_busy()
        elif self.under_way:
            self.under_way.pop(0)()


def extents(offset: int, nbytes: int) -> range:
    return range(offset // EXTENT_BYTES, (offset + nbytes) // EXTENT_BYTES)


def all_of(messages: list[p.MemoryInUse]) -> set[int]:
    return {extent for m in messages for extent in extents(m.offset, m.nbytes)}


@given(st.lists(st.sampled_from(MOVES), max_size=80), st.integers(0, NUM_EXTENTS))
def test_whatever_happens_slots_lie_in_memory_that_is_taken_and_announced(
    moves: list[str], up_to_extents: int
) -> None:
    node = Node(up_to_extents=up_to_extents)
    for move in moves:
        node.move(move)
    used = {e for span in node.slots.spans() for e in [span.first_extent]}
    in_front = set(range(up_to_extents))

    assert used <= {extent for part in node.taken for extent in part}
    while node.under_way:
        node.move("done")
    assert used <= all_of(node.announced) == all_of(node.ahead.in_use())
    assert all_of(node.announced) - used <= in_front


def test_in_a_quiet_node_cache_all_up_to_the_bound_is_taken_step_by_step() -> None:
    node = Node(up_to_extents=NUM_EXTENTS // 2)
    for _ in range(50):
        for move in ("wait", "tick", "tick", "done"):
            node.move(move)

    assert [extent for part in node.taken for extent in part] == list(range(NUM_EXTENTS // 2))
    assert len(node.taken) > 1
    (front,) = node.ahead.in_use()
    assert front.nbytes == NUM_EXTENTS // 2 * EXTENT_BYTES


@pytest.mark.parametrize("busy", [True, False])
def test_nothing_is_taken_ahead_while_somebody_waits(busy: bool) -> None:
    node = Node(up_to_extents=NUM_EXTENTS)
    node.move("wait")
    if busy:
        node.move("busy")
    node.move("tick")

    assert bool(node.taken) != busy
