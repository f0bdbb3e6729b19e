"""Lookups: which leading blocks of a prompt can be had, and bringing them into slots.

A lookup starts with every block open and only ever shortens its prefix: `end` falls to the first
block that turns out to be absent, corrupt, late, or without room. It is settled when nothing
before `end` is open.

    per block of the tail [read_from, len):  OPEN ─► probed ─► WAITING on a slot ─► PINNED
    of the head [0, read_from):              OPEN ─► counted as stored, or not; never read

Probes go out in growing groups, so a cold prompt costs one look at storage and a long hit is
probed in parallel. Everything here runs on the event loop's thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from ucm.store.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.io import Pool
from ucm.store.node.state import Connection, OpenedNamespace
from ucm.store.node.writeback import WriteBack
from ucm.store.slots import Slot, SlotState, SlotTable
from ucm.store.tier import PageRead, ReadStatus, Tier

FIRST_PROBE = 8
PROBE_GROUP = 16


@dataclass(eq=False, slots=True)
class LookupJob:
    """State of one lookup. `pinned` maps block index to slot; `waiting` holds blocks whose slot is
    being filled; `unprobed` the blocks of the tail that storage must be asked about, in order."""

    id: int
    connection: Connection
    namespace: OpenedNamespace
    keys: Sequence[Key]
    read_from: int
    load: bool
    deadline_s: float
    end: int
    head_stored: int = 0
    head_open: bool = False
    unprobed: list[int] = field(default_factory=list)
    probes_running: int = 0
    waiting: set[int] = field(default_factory=set)
    pinned: dict[int, Slot] = field(default_factory=dict)
    stored: set[int] = field(default_factory=set)
    from_files: int = 0
    reason: str = ""
    closed: bool = False

    def shorten(self, end: int, reason: str) -> None:
        """Block `end` can't be had. Keeps the reason of the earliest such block."""
        if end < self.end:
            self.end = end
            self.reason = reason

    def first_open(self) -> int | None:
        """The first block of the prefix that is neither here nor known to be absent."""
        have = self.pinned if self.load else self.stored
        return next((i for i in range(self.read_from, self.end) if i not in have), None)

    def is_settled(self) -> bool:
        return not self.head_open and self.first_open() is None

    def next_probes(self, max_groups: int) -> list[list[int]]:
        """The next groups of the tail to ask storage about; none while others are out."""
        if self.probes_running or not self.unprobed or self.unprobed[0] >= self.end:
            return []
        if not self.stored and not self.pinned and not self.waiting:
            groups = [self.unprobed[:FIRST_PROBE]]
        else:
            stop = min(len(self.unprobed), max_groups * PROBE_GROUP)
            groups = [self.unprobed[i : i + PROBE_GROUP] for i in range(0, stop, PROBE_GROUP)]
        del self.unprobed[: sum(len(group) for group in groups)]
        self.probes_running += len(groups)
        return groups


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
        clock: Callable[[], float],
    ) -> None:
        self._slots = slots
        self._tier = tier
        self._reads = reads
        self._writeback = writeback
        self._page_of = page_of
        self._count = count
        self._clock = clock
        self._open: dict[tuple[Connection, int], LookupJob] = {}
        self._waiters: defaultdict[Slot, list[tuple[LookupJob, int]]] = defaultdict(list)

    @property
    def num_open(self) -> int:
        return len(self._open)

    # -- start and end ---------------------------------------------------------------------

    def start(self, connection: Connection, namespace: OpenedNamespace, message: p.Lookup) -> None:
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
        self._open[connection, message.id] = job
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

    def withdraw(self, connection: Connection, lookup_id: int | None = None) -> None:
        """Ends unanswered lookups: one, or all of a connection. Reads under way go on; their pages
        stay as hits for others."""
        for owner, open_id in list(self._open):
            if owner is connection and lookup_id in (None, open_id):
                job = self._open.pop((owner, open_id))
                job.closed = True
                self._unpin(job, range(len(job.keys)))

    def tick(self) -> None:
        """Settles lookups whose deadline has passed for what is there."""
        now_s = self._clock()
        for job in list(self._open.values()):
            if now_s < job.deadline_s:
                continue
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
        if self._tier is None:
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
            job.shorten(group[leading], "io_error" if failed else "never_stored")
        for i in group[:leading]:
            if i >= job.end:
                break
            if job.load:
                self._bring(job, i)
            else:
                job.stored.add(i)
        self._probe_tail(job)
        self._answer_if_settled(job)

    def _bring(self, job: LookupJob, i: int) -> None:
        """Block `i` is in storage: pin it if somebody brought it meanwhile, else read it."""
        key = job.keys[i]
        slot = self._slots.find(key)
        if slot is not None and slot.state is SlotState.READY:
            self._pin(job, i, slot)
            return
        if slot is None:
            slot = self._slots.reserve(key, job.namespace.slot_bytes)
            if slot is None:
                job.shorten(i, "no_room")
                return
            assert self._tier is not None
            self._reads.submit(
                partial(self._tier.read, job.namespace.tier, key, self._page_of(slot)),
                partial(self._on_read, slot, key),
                on_overdue=partial(self._on_read_overdue, slot),
            )
        self._wait(job, i, slot)

    def _on_read(self, slot: Slot, key: Key, result: object) -> None:
        if slot.state is SlotState.ASIDE:
            self._slots.abandon(slot)
            return
        if isinstance(result, PageRead) and result.status is ReadStatus.HIT:
            self._count("read_hit", 1)
            self._slots.ready(slot)
            self.resolve(slot, "", from_files=True)
            return
        reason = result.status.name.lower() if isinstance(result, PageRead) else "io_error"
        self._count(f"read_{reason}", 1)
        if self._writeback is not None:
            self._writeback.forget_stored(key)
        self._slots.abandon(slot)
        self.resolve(slot, "never_stored" if reason == "absent" else reason)

    def _on_read_overdue(self, slot: Slot) -> None:
        self._count("read_overdue", 1)
        self._slots.set_aside(slot)
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
