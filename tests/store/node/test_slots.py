"""Slot states against a plain model: whatever happens, no page is lost, shared, or overwritten."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from ucm.store.blocks.keys import Key
from ucm.store.node.slots import Slot, SlotState, SlotTable, span_extents

EXTENT = 64
CAPACITY = 8 * EXTENT
SIZES = [16, 24, 64, 100, 200]


def key(n: int) -> Key:
    return Key(n.to_bytes(32, "big"))


class SlotMachine(RuleBasedStateMachine):
    """The model knows which slots somebody relies on: being filled, pinned, or set aside."""

    filling = Bundle("filling")
    pinned = Bundle("pinned")
    aside = Bundle("aside")

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(CAPACITY, extent_bytes=EXTENT)
        self.relied_on: dict[int, tuple[int, Key | None, int]] = {}
        self.next_key = 0

    def rely(self, slot: Slot) -> None:
        self.relied_on[id(slot)] = (slot.offset, slot.key, slot.span.slot_bytes)

    @rule(target=filling, size=st.sampled_from(SIZES))
    def reserve(self, size: int):
        self.next_key += 1
        slot = self.table.reserve(key(self.next_key), size)
        if slot is None:
            # Refusing is right only when nothing of the arena could be reused.
            free = CAPACITY - sum(
                self.slot_range(s)[1] - self.slot_range(s)[0] for s in self.live()
            )
            assert size > CAPACITY or self.live() or free < size
            return None
        assert slot.state is SlotState.FILLING
        self.rely(slot)
        return slot

    @rule(target=pinned, slot=consumes(filling))
    def fill_and_pin(self, slot: Slot | None):
        if slot is None:
            return None
        self.table.ready(slot)
        self.table.pin(slot)
        return slot

    @rule(slot=consumes(filling))
    def fill_and_leave(self, slot: Slot | None):
        if slot is not None:
            self.table.ready(slot)
            del self.relied_on[id(slot)]

    @rule(slot=consumes(filling))
    def give_up(self, slot: Slot | None):
        if slot is not None:
            self.table.abandon(slot)
            del self.relied_on[id(slot)]

    @rule(target=aside, slot=consumes(filling))
    def hang(self, slot: Slot | None):
        if slot is None:
            return None
        forgotten = slot.key
        self.table.set_aside(slot)
        assert forgotten is not None
        assert self.table.find(forgotten) is None
        self.rely(slot)
        return slot

    @rule(slot=consumes(aside))
    def return_late(self, slot: Slot | None):
        if slot is not None:
            self.table.abandon(slot)
            del self.relied_on[id(slot)]

    @rule(slot=pinned)
    def pin_twice(self, slot: Slot | None):
        if slot is not None:
            self.table.pin(slot)
            self.table.unpin(slot)

    @rule(slot=consumes(pinned))
    def unpin(self, slot: Slot | None):
        if slot is not None:
            self.table.unpin(slot)
            del self.relied_on[id(slot)]

    def live(self) -> list[Slot]:
        return [
            slot for span in self.table.spans() for slot in span.slots if id(slot) in self.relied_on
        ]

    @staticmethod
    def slot_range(slot: Slot) -> tuple[int, int]:
        return slot.offset, slot.offset + slot.span.slot_bytes

    @invariant()
    def the_conservation_law_holds(self) -> None:
        self.table.check()

    @invariant()
    def counts_are_those_of_a_walk_over_all_slots(self) -> None:
        slots = [slot for span in self.table.spans() for slot in span.slots]
        counts = self.table.counts()
        for state in SlotState:
            assert getattr(counts, state.value) == sum(slot.state is state for slot in slots)
        assert counts.pins == sum(slot.pins for slot in slots)

    @invariant()
    def slots_that_somebody_relies_on_stay_as_they_are(self) -> None:
        live = self.live()
        assert len(live) == len(self.relied_on)
        for slot in live:
            assert self.relied_on[id(slot)] == (slot.offset, slot.key, slot.span.slot_bytes)
            assert slot.state is not SlotState.FREE

    @invariant()
    def no_two_slots_overlap_and_all_lie_in_the_arena(self) -> None:
        ranges = sorted(self.slot_range(s) for span in self.table.spans() for s in span.slots)
        for (_, end), (start, _) in pairwise(ranges):
            assert end <= start
        assert all(0 <= start and end <= CAPACITY for start, end in ranges)


SlotMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestSlotMachine = SlotMachine.TestCase


def filled(table: SlotTable, n: int, size: int) -> Slot:
    slot = table.reserve(key(n), size)
    assert slot is not None
    table.ready(slot)
    return slot


def test_counting_looks_at_no_slot(monkeypatch: pytest.MonkeyPatch):
    """Of 400,000 slots a walk takes so long that nobody is answered meanwhile."""
    table = SlotTable(128, extent_bytes=64)
    table.pin(filled(table, 1, 32))
    filled(table, 2, 32)
    for span in table.spans():
        monkeypatch.setattr(span, "slots", None)
    counts = table.counts()
    assert (counts.free, counts.filling, counts.ready, counts.aside) == (0, 0, 2, 0)
    assert counts.pins == 1


def test_the_page_used_longest_ago_is_evicted_first():
    table = SlotTable(128, extent_bytes=64)
    for n in range(4):
        filled(table, n, 32)
    first = table.find(key(0))
    assert first is not None
    table.touch(first)

    filled(table, 9, 32)

    assert table.find(key(0)) is not None
    assert table.find(key(1)) is None


def test_a_pinned_page_is_not_evicted_and_a_full_table_refuses():
    table = SlotTable(64, extent_bytes=64)
    for n in range(2):
        table.pin(filled(table, n, 32))

    assert table.reserve(key(9), 32) is None
    assert table.find(key(0)) is not None


def test_memory_of_one_page_size_is_taken_over_by_another_when_unused():
    table = SlotTable(256, extent_bytes=64)
    for n in range(8):
        filled(table, n, 32)

    slot = table.reserve(key(99), 64)

    assert slot is not None
    table.check()


def test_memory_under_a_pin_or_a_hung_read_is_not_taken_over():
    table = SlotTable(128, extent_bytes=64)
    table.pin(filled(table, 0, 64))
    hung = table.reserve(key(1), 64)
    assert hung is not None
    table.set_aside(hung)

    assert table.reserve(key(2), 32) is None
    table.abandon(hung)
    assert table.reserve(key(2), 32) is not None


@pytest.mark.parametrize(
    ("slot_bytes", "extents"), [(16, 1), (64, 1), (65, 2), (100, 2), (513, 0), (512, 8)]
)
def test_spans_take_the_fewest_extents_that_waste_little(slot_bytes: int, extents: int):
    got = span_extents(slot_bytes, 64, 8)
    assert (got == 0) == (extents == 0)
    assert got * 64 >= slot_bytes or got == 0


def test_every_span_that_is_put_into_use_is_announced_from_the_front_of_the_memory():
    table = SlotTable(16 * 64, extent_bytes=64)
    announced: list[int] = []
    table.on_span = lambda span: announced.append(span.first_extent)
    for i in range(5):
        table.reserve(key(i), 32)

    assert announced == [0, 1, 2]
