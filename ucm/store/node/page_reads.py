"""Reading a lookup's pages from storage into slots, the earliest block first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node.fills import Fills
from ucm.store.node.io_threads import LanePool, error_reason
from ucm.store.node.lookup_state import LookupJob
from ucm.store.node.parts import NodeParts
from ucm.store.node.promised_again import PromisedAgain
from ucm.store.node.read_times import ReadTimes
from ucm.store.node.sessions import Filling
from ucm.store.node.slots import SlotState
from ucm.store.tiers.tier import ReadStatus

# Small pages that only wait for a thread are read in groups of about this size.
_READ_BYTES = 2 << 20
# One lookup's reads at a time: one running, one next in line.
_READS_PER_THREAD = 2
# Looking up a member of an Enum takes as long as a call.
_ASIDE, _READY, _HIT = SlotState.ASIDE, SlotState.READY, ReadStatus.HIT
# Of the reading of a page.
_End: TypeAlias = ReadStatus | Outcome


class PageReads:
    """Owned by the event loop's thread."""

    def __init__(
        self,
        parts: NodeParts,
        fills: Fills,
        again: PromisedAgain,
        go_on: Callable[[LookupJob], None],
    ) -> None:
        self._slots = parts.slots
        self._lanes = parts.reads
        self._far = parts.far
        self._page_of = parts.page_of
        self._parts = parts
        self._notices = parts.notices
        self._fills = fills
        self._again = again
        self._go_on = go_on
        self._times = ReadTimes(parts.clock)

    def go_on_with(self, job: LookupJob) -> None:
        """Keeps the threads busy with this lookup, and no more than that: others get their turn,
        and what is late at the deadline was never started and has pushed nobody out. In order:
        what lies behind a block that has to wait for its lane is of no use before it is."""
        while (pool := self._next_turn(job)) is not None:
            # While threads are idle, one page each. Small pages that only wait for a thread go in
            # groups: handing over a job costs about as much as copying 64 KiB.
            is_grouped = pool.depth >= pool.num_threads and not self._parts.tier.is_by_request
            slot_bytes = job.namespace.slot_bytes
            most = max(1, _READ_BYTES // slot_bytes) if is_grouped else 1
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
        # What near lacks is read from far, and counts as well.
        busy = [pool, *([self._far.reads.of(job.keys[i])] if self._far is not None else [])]
        has_turn = all(
            job.reads_running[each] < _READS_PER_THREAD * each.num_threads for each in busy
        )
        return pool if has_turn else None

    def _begin_next(self, job: LookupJob, most: int) -> list[Filling]:
        """Slots for the next blocks to read; pins those that somebody has brought meanwhile."""
        begun: list[Filling] = []
        while len(begun) < most and (i := job.next_unread()) is not None:
            slot = self._slots.find(job.keys[i])
            if slot is not None and slot.state is _READY:
                job.here(i, slot)
                continue
            if slot is None:
                filling = self._begin(job, i)
                if filling is None:
                    job.lose(i, Outcome.NO_ROOM)
                    break
                begun.append(filling)
                job.begun.add(i)
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
        self._submit(job, self._parts, pool, fillings, partial(self._on_read, job, pool))

    def _submit(
        self,
        job: LookupJob,
        parts: NodeParts,
        pool: LanePool,
        fillings: list[Filling],
        on_read: Callable[[list[Filling], list[_End]], None],
    ) -> None:
        """Reads from the tier of `parts`. What was not set aside meanwhile is then `on_read`'s."""
        keys = [filling.key for filling in fillings]
        pages = [self._page_of(filling.slot) for filling in fillings]
        job.reads_running[pool] += 1
        self._times.begin(job)

        def on_done(result: object) -> None:
            job.reads_running[pool] -= 1
            if not job.reads_running.total():
                self._times.end(job)
            ends = self._ends_of(result, len(fillings))
            if any(filling.slot.state is _ASIDE for filling in fillings):
                on_read(*self._without_aside(fillings, ends))
            else:
                on_read(fillings, ends)
            if not job.closed:
                self._go_on(job)

        pool.submit(
            partial(parts.tier.read_all, job.namespace.tier, keys, pages),
            on_done,
            on_overdue=partial(self._on_read_overdue, parts, pool, fillings),
        )

    def _without_aside(
        self, fillings: list[Filling], ends: list[_End]
    ) -> tuple[list[Filling], list[_End]]:
        """Of what was set aside nobody waits for the end but the slot."""
        left: list[tuple[Filling, _End]] = []
        for filling, end in zip(fillings, ends, strict=True):
            if filling.slot.state is _ASIDE:
                self._fills.unused(filling.slot)
            else:
                left.append((filling, end))
        return [filling for filling, _ in left], [end for _, end in left]

    def _ends_of(self, result: object, num_pages: int) -> list[_End]:
        if not isinstance(result, list):
            return [error_reason(result)] * num_pages
        for page_read in result:
            if page_read.detail:
                self._notices.warn(f"read_{page_read.status.value}", page_read.detail)
        return [page_read.status for page_read in result]

    def _on_read(
        self, job: LookupJob, pool: LanePool, fillings: list[Filling], ends: list[_End]
    ) -> None:
        elsewhere: dict[Filling, _End] = {}
        for filling, end in self._note_read(self._parts, pool, fillings, ends):
            if self._is_worth_far(job, filling):
                elsewhere[filling] = end
            else:
                self._gone(filling, end, pool)
        if self._far is not None:
            # One by one: it is the way that takes long, whatever the size of a page.
            for filling in elsewhere:
                far_pool = self._far.reads.of(filling.key)
                on_read = partial(self._on_far_read, self._far, (pool, far_pool), elsewhere)
                self._submit(job, self._far, far_pool, [filling], on_read)

    def _note_read(
        self, parts: NodeParts, pool: LanePool, fillings: list[Filling], ends: list[_End]
    ) -> list[tuple[Filling, _End]]:
        """The pages that have come are there now. Returns the others."""
        for end, number in Counter(ends).items():
            parts.count(f"read_{end.value}", number)
        read = list(zip(fillings, ends, strict=True))
        hits = [filling for filling, end in read if end is _HIT]
        if hits:
            self._again.has_read(pool)
            self._fills.were_read(hits, from_far=parts is self._far)
        return [(filling, end) for filling, end in read if end is not _HIT]

    def _is_worth_far(self, job: LookupJob, filling: Filling) -> bool:
        """There may be a page, and somebody waits for it."""
        if self._far is None or self._far.reads.is_stalled(filling.key):
            return False
        return not job.closed or bool(self._fills.waiting.of(filling.key))

    def _on_far_read(
        self,
        far: NodeParts,
        pools: tuple[LanePool, LanePool],
        near_ends: dict[Filling, _End],
        fillings: list[Filling],
        ends: list[_End],
    ) -> None:
        near_pool, far_pool = pools
        for filling, end in self._note_read(far, far_pool, fillings, ends):
            near_end = near_ends[filling]
            if near_end is ReadStatus.ABSENT:
                self._gone(filling, end, far_pool)
            else:
                self._gone(filling, near_end, near_pool)

    def _gone(self, filling: Filling, end: _End, pool: LanePool) -> None:
        is_absent = end is ReadStatus.ABSENT
        reason = Outcome.NEVER_STORED if is_absent else Outcome(end.value)
        failed_in = pool if reason is Outcome.IO_ERROR else None
        self._fills.gone(filling, reason, failed_in=failed_in)

    def _on_read_overdue(self, parts: NodeParts, pool: LanePool, fillings: list[Filling]) -> None:
        name = parts.reads.name_of(pool)
        self._notices.warn(
            "read_overdue", f"{name} hangs; its slots are set aside until it returns", of=name
        )
        for filling in fillings:
            parts.count("read_overdue")
            self._fills.gone(filling, Outcome.TIMEOUT, is_written=True)


def _key_of(filling: Filling) -> Key:
    return filling.key
