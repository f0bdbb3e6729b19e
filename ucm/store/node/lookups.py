"""Lookups: which leading blocks of a prompt can be had, and bringing them into slots.

A lookup starts with every block open and only ever shortens its prefix: `end` falls to the first
block that turns out to be absent, corrupt, late, or without room. It is settled when nothing
before `end` is open.

    per block of the tail [read_from, len):  OPEN ─► probed ─► WAITING on a slot ─► PINNED
    of the head [0, read_from):              OPEN ─► counted as stored, or not; never read

Probes go out in growing groups, so a cold prompt costs one look at storage and a long hit is
probed in parallel; reads follow, the earliest block first. Everything here runs on the event
loop's thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

from ucm.errors import ProtocolError
from ucm.store.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.io import Pool, error_reason
from ucm.store.node.lookup_job import LookupJob
from ucm.store.node.notices import Notices
from ucm.store.node.state import Connection, OpenedNamespace
from ucm.store.node.writeback import WriteBack
from ucm.store.slots import Slot, SlotState, SlotTable
from ucm.store.tier import ReadStatus, Tier

# Small pages that only wait for a thread are read in groups of about this size.
_READ_BYTES = 2 << 20
# One lookup's reads at a time: one running, one next in line.
_READS_PER_THREAD = 2


class Lookups:
    """All lookups under way, and who waits for which slot."""

    def __init__(
        self,
        *,
        slots: SlotTable,
        tier: Tier | None,
        reads: Pool,
        writeback: WriteBack | None,
        page_of: Callable[[Slot], memoryview],
        count: Callable[[str, int], None],
        notices: Notices,
        clock: Callable[[], float],
    ) -> None:
        self._slots = slots
        self._tier = tier
        self._reads = reads
        self._writeback = writeback
        self._page_of = page_of
        self._count = count
        self._notices = notices
        self._clock = clock
        self._open: dict[tuple[Connection, int], LookupJob] = {}
        self._waiters: defaultdict[Slot, list[tuple[LookupJob, int]]] = defaultdict(list)

    @property
    def num_open(self) -> int:
        return len(self._open)

    # -- start and end ---------------------------------------------------------------------

    def start(self, connection: Connection, namespace: OpenedNamespace, message: p.Lookup) -> None:
        lookup = (connection, message.id)
        if message.read_from > len(message.keys):
            raise ProtocolError(f"lookup {message.id}: read_from is beyond its keys")
        if lookup in self._open or lookup in connection.session.pinned:
            raise ProtocolError(f"lookup {message.id} was not released")
        job = LookupJob(
            id=message.id,
            connection=connection,
            namespace=namespace,
            keys=[Key(key) for key in message.keys],
            read_from=message.read_from,
            load=message.load,
            deadline_s=self._clock() + message.timeout_ms / 1000,
            end=len(message.keys),
        )
        self._open[lookup] = job
        self._count("lookups", 1)
        storage = self._tier is not None and not self._reads.stalled
        self._scan_head(job, storage=storage)
        for i in range(job.read_from, len(job.keys)):
            if i >= job.end:
                break
            self._look_in_memory(job, i)
        if job.unprobed and not storage:
            job.shorten(job.unprobed[0], "never_stored" if self._tier is None else "timeout")
        self._probe_tail(job)
        self._answer_if_settled(job)

    def withdraw(self, connection: Connection, lookup_id: int) -> None:
        """Ends a lookup that is not answered yet, if there is one. Reads under way go on; their
        pages stay as hits for others."""
        job = self._open.pop((connection, lookup_id), None)
        if job is not None:
            job.closed = True
            self._unpin(job, range(len(job.keys)))

    def withdraw_all(self, connection: Connection) -> None:
        for lookup_id in [number for owner, number in self._open if owner is connection]:
            self.withdraw(connection, lookup_id)

    def tick(self) -> None:
        """Settles lookups whose deadline has passed for what is there."""
        now_s = self._clock()
        for job in [job for job in self._open.values() if job.deadline_s <= now_s]:
            first_open = job.first_open()
            if first_open is not None:
                job.shorten(first_open, "timeout")
            job.head_open = False
            self._answer_if_settled(job)

    # -- the head: is it stored? -----------------------------------------------------------

    def _scan_head(self, job: LookupJob, *, storage: bool) -> None:
        while job.head_stored < job.read_from and self._is_stored(job.keys[job.head_stored]):
            job.head_stored += 1
        asked = [k for k in job.keys[job.head_stored : job.read_from] if not self._is_stored(k)]
        if not asked or self._tier is None or not storage:
            if not asked:
                job.head_stored = job.read_from
            return
        job.head_open = True

        def probed(result: object) -> None:
            leading = result if isinstance(result, int) else 0
            self._note_stored(asked[:leading])
            while job.head_stored < job.read_from and self._is_stored(job.keys[job.head_stored]):
                job.head_stored += 1
            job.head_open = False
            self._answer_if_settled(job)

        self._reads.submit(partial(self._tier.contains, job.namespace.tier, asked), probed)

    def _is_stored(self, key: Key) -> bool:
        """In this node's memory, or seen in the tier a moment ago."""
        if self._slots.find(key) is not None:
            return True
        return self._writeback is not None and self._writeback.was_stored(key)

    def _note_stored(self, keys: Iterable[Key]) -> None:
        if self._writeback is not None:
            for key in keys:
                self._writeback.note_stored(key)

    # -- the tail: bring it here -----------------------------------------------------------

    def _look_in_memory(self, job: LookupJob, i: int) -> None:
        slot = self._slots.find(job.keys[i])
        if slot is None:
            job.unprobed.append(i)
        elif not job.load:
            job.stored.add(i)
        elif slot.state is SlotState.READY:
            self._pin(job, i, slot)
        elif job.keys[i] in job.connection.session.filling:
            # This very engine is computing the block: its own prefix cache will have it first.
            job.shorten(i, "being_computed_here")
        else:
            self._wait(job, i, slot)

    def _probe_tail(self, job: LookupJob) -> None:
        if self._tier is None or job.closed:
            return
        for group in job.next_probes(self._reads.num_threads):
            keys = [job.keys[i] for i in group]
            self._reads.submit(
                partial(self._tier.contains, job.namespace.tier, keys),
                partial(self._on_probed, job, group),
            )

    def _on_probed(self, job: LookupJob, group: list[int], result: object) -> None:
        job.probes_running -= 1
        leading = result if isinstance(result, int) else 0
        self._note_stored(job.keys[i] for i in group[:leading])
        if job.closed:
            return
        if leading < len(group):
            failed = isinstance(result, Exception)
            if failed:
                self._notices.warn("lookup_failed", result)
            job.shorten(group[leading], error_reason(result) if failed else "never_stored")
        if job.load:
            job.add_unread(group[:leading])
        else:
            job.stored.update(group[:leading])
        self._go_on(job)

    def _go_on(self, job: LookupJob) -> None:
        self._read_tail(job)
        self._probe_tail(job)
        self._answer_if_settled(job)

    def _read_tail(self, job: LookupJob) -> None:
        """Keeps the threads busy with this lookup, and no more than that: others get their turn,
        and what is late at the deadline was never started and has pushed nobody out."""
        reads = self._reads
        while job.unread and job.reads_running < _READS_PER_THREAD * reads.num_threads:
            # While threads are idle, one page each. Small pages that only wait for a thread go in
            # groups: handing over a job costs about as much as copying 64 KiB.
            is_busy = reads.depth >= reads.num_threads
            slot_bytes = job.namespace.slot_bytes
            slots = self._next_slots(job, max(1, _READ_BYTES // slot_bytes) if is_busy else 1)
            if slots:
                self._read(job, slots)

    def _next_slots(self, job: LookupJob, max_slots: int) -> list[Slot]:
        """Slots for the next blocks to read; pins those that somebody has brought meanwhile."""
        slots: list[Slot] = []
        while len(slots) < max_slots and (i := job.next_unread()) is not None:
            key = job.keys[i]
            slot = self._slots.find(key)
            if slot is not None and slot.state is SlotState.READY:
                self._pin(job, i, slot)
                continue
            if slot is None:
                slot = self._reserve(job, i)
                if slot is None:
                    job.shorten(i, "no_room")
                    break
                slots.append(slot)
            self._wait(job, i, slot)
        return slots

    def _reserve(self, job: LookupJob, i: int) -> Slot | None:
        """A slot for block `i`, if need be at the cost of this lookup's own tail: of a prompt that
        is longer than the memory, the head is worth more."""
        slot = self._slots.reserve(job.keys[i], job.namespace.slot_bytes)
        while slot is None and job.pinned and (last := max(job.pinned)) > i:
            job.shorten(last, "no_room")
            self._unpin(job, range(last, last + 1))
            slot = self._slots.reserve(job.keys[i], job.namespace.slot_bytes)
        return slot

    def _read(self, job: LookupJob, slots: list[Slot]) -> None:
        assert self._tier is not None
        keys = [slot.key for slot in slots if slot.key is not None]
        pages = [self._page_of(slot) for slot in slots]
        job.reads_running += 1
        self._reads.submit(
            partial(self._tier.read_all, job.namespace.tier, keys, pages),
            partial(self._on_read, job, slots, keys),
            on_overdue=partial(self._on_read_overdue, slots),
        )

    def _on_read(self, job: LookupJob, slots: list[Slot], keys: list[Key], result: object) -> None:
        job.reads_running -= 1
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
            self.resolve(slot, "", from_files=True)
        else:
            absent = outcome == ReadStatus.ABSENT.value
            self.resolve(slot, "never_stored" if absent else outcome)

    def _on_read_overdue(self, slots: list[Slot]) -> None:
        self._notices.warn(
            "read_overdue", "storage hangs; its slots are set aside until it returns"
        )
        for slot in slots:
            self._count("read_overdue", 1)
            key = slot.key
            self._slots.set_aside(slot)
            if self._writeback is not None and key is not None:
                self._writeback.filled_from_tier(key, is_hit=False)
            self.resolve(slot, "timeout")

    # -- slots that others fill ------------------------------------------------------------

    def _wait(self, job: LookupJob, i: int, slot: Slot) -> None:
        job.waiting.add(i)
        self._waiters[slot].append((job, i))

    def resolve(self, slot: Slot, reason: str, *, from_files: bool = False) -> None:
        """The slot became READY (`reason` empty) or never will: tells the lookups that wait."""
        for job, i in self._waiters.pop(slot, []):
            job.waiting.discard(i)
            if job.closed:
                continue
            if reason:
                job.shorten(i, reason)
            elif i < job.end:
                self._pin(job, i, slot)
                job.from_files += from_files
            self._answer_if_settled(job)

    def _pin(self, job: LookupJob, i: int, slot: Slot) -> None:
        self._slots.pin(slot)
        job.pinned[i] = slot

    def _unpin(self, job: LookupJob, blocks: range) -> None:
        # Tail first: the head of a prompt is shared by more prompts and should be evicted last.
        for i in reversed(blocks):
            if i in job.pinned:
                self._slots.unpin(job.pinned.pop(i))

    def _answer_if_settled(self, job: LookupJob) -> None:
        if job.closed or not job.is_settled():
            return
        job.closed = True
        del self._open[job.connection, job.id]
        self._unpin(job, range(job.end, len(job.keys)))
        num_stored = job.end - job.read_from
        self._count("lookup_blocks_asked", len(job.keys) - job.read_from)
        self._count("lookup_blocks_hit", num_stored)
        if job.reason:
            self._count(f"lookup_ended_{job.reason}", 1)
        slots = [job.pinned[i] for i in range(job.read_from, job.end)] if job.load else []
        if slots:
            job.connection.session.pinned[job.connection, job.id] = slots
        job.connection.send(
            p.LookupReply(
                id=job.id,
                offsets=[slot.offset for slot in slots],
                num_stored=num_stored,
                from_files=job.from_files,
                head_stored=job.head_stored,
                reason=job.reason,
            )
        )
