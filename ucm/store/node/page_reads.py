"""Reading a lookup's pages from storage into slots, the earliest block first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node.fills import Fills
from ucm.store.node.io_threads import LanePool, error_reason
from ucm.store.node.lookup_state import LookupJob
from ucm.store.node.parts import NodeParts
from ucm.store.node.read_times import ReadTimes
from ucm.store.node.sessions import Filling
from ucm.store.node.slots import SlotState
from ucm.store.tiers.tier import ReadStatus

# Small pages that only wait for a thread are read in groups of about this size.
_READ_BYTES = 2 << 20
# One lookup's reads at a time: one running, one next in line.
_READS_PER_THREAD = 2


class PageReads:
    """Owned by the event loop's thread."""

    def __init__(self, parts: NodeParts, fills: Fills, go_on: Callable[[LookupJob], None]) -> None:
        self._slots = parts.slots
        self._tier = parts.tier
        self._lanes = parts.reads
        self._page_of = parts.page_of
        self._count = parts.count
        self._notices = parts.notices
        self._fills = fills
        self._go_on = go_on
        self._times = ReadTimes(parts.clock)

    def go_on_with(self, job: LookupJob) -> None:
        """Keeps the threads busy with this lookup, and no more than that: others get their turn,
        and what is late at the deadline was never started and has pushed nobody out. In order:
        what lies behind a block that has to wait for its lane is of no use before it is."""
        while (pool := self._next_turn(job)) is not None:
            # While threads are idle, one page each. Small pages that only wait for a thread go in
            # groups: handing over a job costs about as much as copying 64 KiB.
            is_busy = pool.depth >= pool.num_threads
            slot_bytes = job.namespace.slot_bytes
            most = max(1, _READ_BYTES // slot_bytes) if is_busy else 1
            for each, group in self._lanes.split(self._begin_next(job, most), _key_of):
                self._read(job, each, group)

    def forget(self, job: LookupJob) -> None:
        """It has ended. What is still being read for it is read for nobody."""
        self._times.end(job)

    def _next_turn(self, job: LookupJob) -> LanePool | None:
        """The threads of the next block to read, if this lookup may have more of them."""
        i = job.next_unread()
        if i is None:
            return None
        pool = self._lanes.of(job.keys[i])
        has_turn = job.reads_running[pool] < _READS_PER_THREAD * pool.num_threads
        return pool if has_turn else None

    def _begin_next(self, job: LookupJob, most: int) -> list[Filling]:
        """Slots for the next blocks to read; pins those that somebody has brought meanwhile."""
        begun: list[Filling] = []
        while len(begun) < most and (i := job.next_unread()) is not None:
            slot = self._slots.find(job.keys[i])
            if slot is not None and slot.state is SlotState.READY:
                job.here(i, slot)
                continue
            if slot is None:
                filling = self._begin(job, i)
                if filling is None:
                    job.lose(i, Outcome.NO_ROOM)
                    break
                begun.append(filling)
            job.comes(i)
        return begun

    def _begin(self, job: LookupJob, i: int) -> Filling | None:
        """A slot for block `i`, if need be at the cost of this lookup's last blocks: of a prompt
        that is longer than the memory, the head is worth more."""
        filling = self._fills.begin_read(job.keys[i], job.namespace)
        while filling is None and (last := job.last_pinned()) is not None and last > i:
            job.lose(last, Outcome.NO_ROOM)
            filling = self._fills.begin_read(job.keys[i], job.namespace)
        return filling

    def _read(self, job: LookupJob, pool: LanePool, fillings: list[Filling]) -> None:
        keys = [filling.key for filling in fillings]
        pages = [self._page_of(filling.slot) for filling in fillings]
        job.reads_running[pool] += 1
        self._times.begin(job)
        pool.submit(
            partial(self._tier.read_all, job.namespace.tier, keys, pages),
            partial(self._on_read, job, pool, fillings),
            on_overdue=partial(self._on_read_overdue, pool, fillings),
        )

    def _on_read(
        self, job: LookupJob, pool: LanePool, fillings: list[Filling], result: object
    ) -> None:
        job.reads_running[pool] -= 1
        if not job.reads_running.total():
            self._times.end(job)
        ends: list[ReadStatus | Outcome] = [error_reason(result)] * len(fillings)
        if isinstance(result, list):
            ends = [page_read.status for page_read in result]
            for page_read in result:
                if page_read.detail:
                    self._notices.warn(f"read_{page_read.status.value}", page_read.detail)
        for filling, end in zip(fillings, ends, strict=True):
            if filling.slot.state is SlotState.ASIDE:
                self._fills.unused(filling.slot)
            else:
                self._on_page_read(filling, end)
        if not job.closed:
            self._go_on(job)

    def _on_page_read(self, filling: Filling, end: ReadStatus | Outcome) -> None:
        if end is ReadStatus.HIT:
            self._count("read_hit")
            self._fills.whole(filling)
            return
        self._count(f"read_{end.value}")
        is_absent = end is ReadStatus.ABSENT
        self._fills.gone(filling, Outcome.NEVER_STORED if is_absent else Outcome(end.value))

    def _on_read_overdue(self, pool: LanePool, fillings: list[Filling]) -> None:
        name = self._lanes.name_of(pool)
        self._notices.warn(
            "read_overdue", f"{name} hangs; its slots are set aside until it returns", of=name
        )
        for filling in fillings:
            self._count("read_overdue", 1)
            self._fills.gone(filling, Outcome.TIMEOUT, is_written=True)


def _key_of(filling: Filling) -> Key:
    return filling.key
