"""Reading a lookup's pages from storage into slots, the earliest block first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node.lanes import Lanes
from ucm.store.node.lookup import LookupJob
from ucm.store.node.notices import Notices
from ucm.store.node.pool import Pool, error_reason
from ucm.store.node.slots import Slot, SlotState, SlotTable
from ucm.store.node.writeback import WriteBack
from ucm.store.tiers.tier import ReadStatus, Tier

# Small pages that only wait for a thread are read in groups of about this size.
_READ_BYTES = 2 << 20
# One lookup's reads at a time: one running, one next in line.
_READS_PER_THREAD = 2


class OnPage(Protocol):
    """Told when a slot is READY, or by which `reason` it never will be."""

    def __call__(
        self, key: Key, slot: Slot, reason: Outcome, *, from_files: bool = False
    ) -> None: ...


class PageReads:
    """Owned by the event loop's thread. `filling` are the slots that storage fills now."""

    def __init__(
        self,
        *,
        slots: SlotTable,
        tier: Tier,
        lanes: Lanes,
        writeback: WriteBack | None,
        page_of: Callable[[Slot], memoryview],
        count: Callable[[str, int], None],
        notices: Notices,
        on_page: OnPage,
        go_on: Callable[[LookupJob], None],
    ) -> None:
        self.filling: set[Slot] = set()
        self._slots = slots
        self._tier = tier
        self._lanes = lanes
        self._writeback = writeback
        self._page_of = page_of
        self._count = count
        self._notices = notices
        self._on_page = on_page
        self._go_on = go_on

    def go_on_with(self, job: LookupJob) -> None:
        """Keeps the threads busy with this lookup, and no more than that: others get their turn,
        and what is late at the deadline was never started and has pushed nobody out. In order:
        what lies behind a block that has to wait for its lane is of no use before it is."""
        while (pool := self._next_turn(job)) is not None:
            # While threads are idle, one page each. Small pages that only wait for a thread go in
            # groups: handing over a job costs about as much as copying 64 KiB.
            is_busy = pool.depth >= pool.num_threads
            slot_bytes = job.namespace.slot_bytes
            slots = self._next_slots(job, max(1, _READ_BYTES // slot_bytes) if is_busy else 1)
            for each, group in self._lanes.split(slots, _key_of):
                self._read(job, each, group)

    def _next_turn(self, job: LookupJob) -> Pool | None:
        """The threads of the next block to read, if this lookup may have more of them."""
        i = job.next_unread()
        if i is None:
            return None
        pool = self._lanes.of(job.keys[i])
        has_turn = job.reads_running[pool] < _READS_PER_THREAD * pool.num_threads
        return pool if has_turn else None

    def _next_slots(self, job: LookupJob, max_slots: int) -> list[Slot]:
        """Slots for the next blocks to read; pins those that somebody has brought meanwhile."""
        slots: list[Slot] = []
        while len(slots) < max_slots and (i := job.next_unread()) is not None:
            key = job.keys[i]
            slot = self._slots.find(key)
            if slot is not None and slot.state is SlotState.READY:
                job.here(i, slot)
                continue
            if slot is None:
                slot = self._reserve(job, i)
                if slot is None:
                    job.lose(i, Outcome.NO_ROOM)
                    break
                slots.append(slot)
            job.comes(i)
        return slots

    def _reserve(self, job: LookupJob, i: int) -> Slot | None:
        """A slot for block `i`, if need be at the cost of this lookup's own tail: of a prompt that
        is longer than the memory, the head is worth more."""
        slot = self._slots.reserve(job.keys[i], job.namespace.slot_bytes)
        while slot is None and job.pinned and (last := max(job.pinned)) > i:
            job.lose(last, Outcome.NO_ROOM)
            slot = self._slots.reserve(job.keys[i], job.namespace.slot_bytes)
        return slot

    def _read(self, job: LookupJob, pool: Pool, slots: list[Slot]) -> None:
        keys = [_key_of(slot) for slot in slots]
        pages = [self._page_of(slot) for slot in slots]
        job.reads_running[pool] += 1
        self.filling.update(slots)
        pool.submit(
            partial(self._tier.read_all, job.namespace.tier, keys, pages),
            partial(self._on_read, job, pool, slots, keys),
            on_overdue=partial(self._on_read_overdue, pool, slots),
        )

    def _on_read(
        self, job: LookupJob, pool: Pool, slots: list[Slot], keys: list[Key], result: object
    ) -> None:
        job.reads_running[pool] -= 1
        self.filling.difference_update(slots)
        if isinstance(result, list):
            outcomes = [page_read.status.value for page_read in result]
            for page_read in result:
                if page_read.detail:
                    self._notices.warn(f"read_{page_read.status.value}", page_read.detail)
        else:
            outcomes = [error_reason(result)] * len(slots)
        for slot, key, outcome in zip(slots, keys, outcomes, strict=True):
            if slot.state is SlotState.ASIDE:
                self._slots.abandon(slot)
            else:
                self._on_page_read(slot, key, outcome)
        if not job.closed:
            self._go_on(job)

    def _on_page_read(self, slot: Slot, key: Key, outcome: str) -> None:
        self._count(f"read_{outcome}", 1)
        is_hit = outcome == ReadStatus.HIT.value
        if is_hit:
            self._slots.ready(slot)
        else:
            self._slots.abandon(slot)
        if self._writeback is not None:
            self._writeback.filled_from_tier(key, is_hit=is_hit)
        if is_hit:
            self._on_page(key, slot, Outcome.FINE, from_files=True)
        else:
            absent = outcome == ReadStatus.ABSENT.value
            self._on_page(key, slot, Outcome.NEVER_STORED if absent else Outcome(outcome))

    def _on_read_overdue(self, pool: Pool, slots: list[Slot]) -> None:
        name = self._lanes.name_of(pool)
        self._notices.warn(
            "read_overdue", f"{name} hangs; its slots are set aside until it returns", of=name
        )
        for slot in slots:
            self._count("read_overdue", 1)
            key = _key_of(slot)
            self._slots.set_aside(slot)
            if self._writeback is not None:
                self._writeback.filled_from_tier(key, is_hit=False)
            self._on_page(key, slot, Outcome.TIMEOUT)


def _key_of(slot: Slot) -> Key:
    assert slot.key is not None, "a slot that is reserved has a key"
    return slot.key
