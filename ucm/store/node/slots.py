"""The slots of a node cache: which page lies where in the shared memory, and who may reuse it.

Pure bookkeeping: no bytes, no I/O, no locks. One thread owns a `SlotTable` (the node cache's
event loop). Offsets are into the arena, the one memory that the node cache shares with its
clients.

    FREE ──reserve──► FILLING ──ready──► READY ──evict (unpinned only)──► FREE
                         │                 pin / unpin
                         ├──abandon──► FREE
                         └──set_aside──► ASIDE ──abandon──► FREE

FILLING  someone writes into the slot: a tier read, or the ranks of an engine.
READY    holds the verified page of its key. Readers hold pins; a pinned slot is never reused.
ASIDE    an I/O on it is overdue. Its key is forgotten at once, its memory is not: late bytes may
         still land there, so it is reused only after the I/O has returned (`abandon`).

The arena is cut into extents of one size. Slots of one size live in spans, runs of neighbouring
extents; a span whose slots are all reusable can be given to another size.

Invariants (`check`): the four states add up to all slots of all spans; a key is in the index iff
its slot is FILLING or READY; a slot can be evicted iff it is READY without pins; spans don't
overlap and every extent is in one span or free; what is counted as slots move is what a walk over
them counts.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from ucm.store.blocks.keys import Key, TailKey

EXTENT_BYTES = 32 << 20
_MAX_SPAN_EXTENTS = 8
_MAX_WASTE = 1 / 8


class SlotState(Enum):
    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    ASIDE = "aside"

    # By identity: Enum's own hashes the name, in Python, twice for each slot that moves.
    __hash__ = object.__hash__


# Looking up a member of an Enum takes as long as a call.
_FREE, _FILLING, _READY, _ASIDE = SlotState


@dataclass(eq=False, slots=True)
class Slot:
    """A place for one page. `offset` is in bytes from the start of the arena."""

    offset: int
    span: Span
    state: SlotState = _FREE
    key: Key | None = None
    pins: int = 0


@dataclass(eq=False, slots=True)
class Span:
    """`num_extents` neighbouring extents from `first_extent`, cut into slots of one size."""

    first_extent: int
    num_extents: int
    slot_bytes: int
    slots: list[Slot] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class _SizeClass:
    free: list[Slot] = field(default_factory=list)
    # Reusable slots, coldest first: READY without pins.
    evictable: OrderedDict[int, Slot] = field(default_factory=OrderedDict)
    spans: list[Span] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SlotCounts:
    free: int
    filling: int
    ready: int
    aside: int
    pins: int


class SlotTable:
    """All slots of one arena. Not thread-safe: one thread owns it."""

    def __init__(
        self,
        capacity_bytes: int,
        *,
        extent_bytes: int = EXTENT_BYTES,
        keeps_unpinned: bool = True,
    ) -> None:
        """With `keeps_unpinned` false, a page is evicted with its last pin: memory only holds what
        is under way."""
        if capacity_bytes <= 0 or extent_bytes <= 0:
            raise ValueError("capacity_bytes and extent_bytes must be positive")
        self.extent_bytes = min(extent_bytes, capacity_bytes)
        self.num_extents = capacity_bytes // self.extent_bytes
        self.capacity_bytes = self.num_extents * self.extent_bytes
        self.evictions = 0
        self._keeps_unpinned = keeps_unpinned
        self._free_extents = set(range(self.num_extents))
        # No run of this many extents is free. In a full cache every reservation would look for one.
        self._no_run_of = self.num_extents + 1
        self._classes: dict[int, _SizeClass] = {}
        self._index: dict[Key, Slot] = {}
        self._per_state = dict.fromkeys(SlotState, 0)
        self._pins = 0
        # Told of every span put into use, so that its memory can be taken and pinned ahead.
        self.on_span: Callable[[Span], None] = lambda span: None

    # -- questions -------------------------------------------------------------------------

    def find(self, key: Key) -> Slot | None:
        """The slot that holds `key` or is being filled with it."""
        return self._index.get(key)

    def fits(self, slot_bytes: int) -> bool:
        """Whether the arena can hold even one slot of this size."""
        return slot_bytes <= self.capacity_bytes

    def counts(self) -> SlotCounts:
        """Kept as slots move: whoever asks, however often, holds nobody up."""
        return SlotCounts(
            free=self._per_state[_FREE],
            filling=self._per_state[_FILLING],
            ready=self._per_state[_READY],
            aside=self._per_state[_ASIDE],
            pins=self._pins,
        )

    def spans(self) -> list[Span]:
        return [span for size in self._classes.values() for span in size.spans]

    # -- moves -----------------------------------------------------------------------------

    def reserve(self, key: Key, slot_bytes: int) -> Slot | None:
        """A FILLING slot for `key`, which must not be in the table; None if there is no room."""
        assert key not in self._index, "a key has one slot"
        size = self._classes.get(slot_bytes)
        if size is None:
            size = self._classes[slot_bytes] = _SizeClass()
        if not size.free and not self._add_span(size, slot_bytes) and not self._evict_one(size):
            self._take_over(size, slot_bytes)
        if not size.free:
            return None
        slot = size.free.pop()
        assert slot.state is _FREE and slot.key is None and slot.pins == 0
        self._move(slot, _FILLING)
        slot.key = key
        self._index[key] = slot
        return slot

    def ready(self, slot: Slot) -> None:
        """FILLING -> READY, unpinned and most recently used."""
        assert slot.state is _FILLING
        self._move(slot, _READY)
        self._may_be_evicted(slot)

    def abandon(self, slot: Slot) -> None:
        """FILLING or ASIDE -> FREE. The caller knows that nobody writes into the slot any more."""
        assert slot.state in (_FILLING, _ASIDE)
        self._forget(slot)

    def set_aside(self, slot: Slot) -> None:
        """FILLING -> ASIDE: the key is absent from now on, the memory stays out of use."""
        assert slot.state is _FILLING and slot.key is not None
        del self._index[slot.key]
        slot.key = None
        self._move(slot, _ASIDE)

    def pin(self, slot: Slot) -> None:
        assert slot.state is _READY
        slot.pins += 1
        self._pins += 1
        self._classes[slot.span.slot_bytes].evictable.pop(slot.offset, None)

    def unpin(self, slot: Slot) -> None:
        """Gives back one pin. Unpin the end of a prompt before its head: it is evicted first."""
        assert slot.state is _READY and slot.pins > 0
        slot.pins -= 1
        self._pins -= 1
        if slot.pins > 0:
            return
        if self._keeps_unpinned:
            self._may_be_evicted(slot)
        else:
            self.evictions += 1
            self._forget(slot)

    def touch(self, slot: Slot) -> None:
        if slot.state is _READY and slot.pins == 0:
            del self._class(slot).evictable[slot.offset]
            self._may_be_evicted(slot)

    def _may_be_evicted(self, slot: Slot) -> None:
        """As the last one; a tail as the first: it serves one prompt, which has had it."""
        evictable = self._classes[slot.span.slot_bytes].evictable
        evictable[slot.offset] = slot
        is_tail = isinstance(slot.key, TailKey)
        if is_tail:
            evictable.move_to_end(slot.offset, last=False)

    # -- making room -----------------------------------------------------------------------

    def _add_span(self, size: _SizeClass, slot_bytes: int) -> bool:
        if not self._free_extents:
            return False
        count = span_extents(slot_bytes, self.extent_bytes, self.num_extents)
        first = self._find_run(count)
        if first is None:
            return False
        self._free_extents.difference_update(range(first, first + count))
        span = Span(first, count, slot_bytes)
        start = first * self.extent_bytes
        num_slots = count * self.extent_bytes // slot_bytes
        span.slots = [Slot(start + i * slot_bytes, span) for i in range(num_slots)]
        size.spans.append(span)
        size.free.extend(reversed(span.slots))
        self._per_state[_FREE] += num_slots
        self.on_span(span)
        return True

    def _find_run(self, count: int) -> int | None:
        if count == 0 or count >= self._no_run_of:
            return None
        run = 0
        for extent in range(self.num_extents):
            run = run + 1 if extent in self._free_extents else 0
            if run == count:
                return extent - count + 1
        self._no_run_of = count
        return None

    def _evict_one(self, size: _SizeClass) -> bool:
        if not size.evictable:
            return False
        _, slot = size.evictable.popitem(last=False)
        self.evictions += 1
        self._forget(slot)
        return True

    def _take_over(self, size: _SizeClass, slot_bytes: int) -> bool:
        """Empties reusable spans of other sizes until a span of this size fits."""
        for other in self._classes.values():
            if other is size:
                continue
            for span in list(other.spans):
                if not all(_reusable(slot) for slot in span.slots):
                    continue
                self._drop_span(other, span)
                if self._add_span(size, slot_bytes):
                    return True
        return False

    def _drop_span(self, size: _SizeClass, span: Span) -> None:
        for slot in span.slots:
            if slot.state is _READY:
                size.evictable.pop(slot.offset)
                self.evictions += 1
                self._forget(slot)
        size.free = [slot for slot in size.free if slot.span is not span]
        self._per_state[_FREE] -= len(span.slots)
        size.spans.remove(span)
        self._free_extents.update(range(span.first_extent, span.first_extent + span.num_extents))
        self._no_run_of = self.num_extents + 1

    def _forget(self, slot: Slot) -> None:
        if slot.key is not None:
            del self._index[slot.key]
        slot.key = None
        self._move(slot, _FREE)
        self._classes[slot.span.slot_bytes].free.append(slot)

    def _move(self, slot: Slot, state: SlotState) -> None:
        self._per_state[slot.state] -= 1
        self._per_state[state] += 1
        slot.state = state

    def _class(self, slot: Slot) -> _SizeClass:
        return self._classes[slot.span.slot_bytes]

    def _all_slots(self) -> list[Slot]:
        return [slot for span in self.spans() for slot in span.slots]

    # -- the conservation law --------------------------------------------------------------

    def check(self) -> None:
        """Raises AssertionError with the broken sentence if an invariant of this module fails."""
        extents: list[int] = sorted(self._free_extents)
        for span in self.spans():
            extents.extend(range(span.first_extent, span.first_extent + span.num_extents))
        assert sorted(extents) == list(range(self.num_extents)), "every extent is free or in a span"
        indexed = 0
        for size in self._classes.values():
            slots = [slot for span in size.spans for slot in span.slots]
            free = {id(slot) for slot in size.free}
            assert len(free) == len(size.free), "a slot is free once"
            for slot in slots:
                assert (slot.state is _FREE) == (id(slot) in free), "free list and state agree"
                assert (slot.offset in size.evictable) == (
                    slot.state is _READY and slot.pins == 0
                ), "evictable means READY without pins"
                assert slot.pins >= 0 and (slot.pins == 0 or slot.state is _READY)
                has_key = slot.state in (_FILLING, _READY)
                assert has_key == (slot.key is not None), "FILLING and READY slots have a key"
                if slot.key is not None:
                    assert self._index.get(slot.key) is slot, "the index finds every key"
                    indexed += 1
            assert len(size.free) <= len(slots) and len(size.evictable) <= len(slots)
        assert indexed == len(self._index), "the index holds nothing else"
        slots = self._all_slots()
        walked = Counter(slot.state for slot in slots)
        assert all(self._per_state[state] == walked[state] for state in SlotState), (
            "the count of each state is that of its slots"
        )
        assert self._pins == sum(slot.pins for slot in slots), "the count of pins is theirs"


def span_extents(slot_bytes: int, extent_bytes: int, num_extents: int) -> int:
    """How many extents a span of such slots takes: the fewest that waste little; 0 if none fits."""
    best, best_waste = 0, 1.0
    for count in range(1, max(_MAX_SPAN_EXTENTS, -(-slot_bytes // extent_bytes)) + 1):
        if count > num_extents:
            break
        span_bytes = count * extent_bytes
        if span_bytes < slot_bytes:
            continue
        waste = span_bytes % slot_bytes / span_bytes
        if waste <= _MAX_WASTE:
            return count
        if waste < best_waste:
            best, best_waste = count, waste
    return best


def _reusable(slot: Slot) -> bool:
    return slot.state is _FREE or (slot.state is _READY and slot.pins == 0)
