"""What lookups have of slots: pins on those that are READY, and a place in line at those that are
being filled. All on the event loop's thread."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from ucm.store.blocks.keys import Key
from ucm.store.node.lookup import LookupJob
from ucm.store.node.slots import Slot, SlotTable


class Holds:
    def __init__(self, slots: SlotTable, clock: Callable[[], float]) -> None:
        self._slots = slots
        self._clock = clock
        self._waiters: defaultdict[Slot, list[tuple[LookupJob, int]]] = defaultdict(list)

    def pin(self, job: LookupJob, i: int, slot: Slot) -> None:
        assert i not in job.pinned, "a lookup holds a page once"
        self._slots.pin(slot)
        job.pinned[i] = slot
        if job.renewal_s:
            job.deadline_s = self._clock() + job.renewal_s

    def unpin(self, job: LookupJob, blocks: range) -> None:
        # Tail first: the head of a prompt is shared by more prompts and should be evicted last.
        for i in reversed(blocks):
            if i in job.pinned:
                self._slots.unpin(job.pinned.pop(i))

    def touch(self, keys: Sequence[Key]) -> None:
        """An engine uses these pages, which it has itself: they are as hot as if they were read.
        Tail first, as with `unpin`."""
        for key in reversed(keys):
            slot = self._slots.find(key)
            if slot is not None:
                self._slots.touch(slot)

    def wait(self, job: LookupJob, i: int, slot: Slot) -> None:
        job.waiting.add(i)
        self._waiters[slot].append((job, i))

    def take_waiters(self, slot: Slot) -> list[tuple[LookupJob, int]]:
        """Those who wait for `slot`, and don't any more."""
        waiters = self._waiters.pop(slot, [])
        for job, i in waiters:
            job.waiting.discard(i)
        return waiters
