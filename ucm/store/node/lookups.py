"""Lookups: which leading blocks of a prompt can be had, and bringing them into slots.

Memory answers at once. Storage is asked about the rest in growing groups, so a cold prompt costs
one look at storage and a long hit is probed in parallel; reads follow, the earliest block first.
Of the head only what is stored is counted: nobody reads it. What each block's state may be is said
in `lookup_state.py`. Everything here runs on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ucm.errors import ProtocolError
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.fills import Fills
from ucm.store.node.heads import Heads
from ucm.store.node.io_threads import error_reason
from ucm.store.node.lookup_state import BlockState, LookupJob
from ucm.store.node.page_reads import PageReads
from ucm.store.node.parts import NodeParts
from ucm.store.node.promised_again import PromisedAgain
from ucm.store.node.promised_pages import Looked, Looks
from ucm.store.node.questions import count_there
from ucm.store.node.sessions import Connection, OpenedNamespace
from ucm.store.node.slots import SlotState
from ucm.store.node.storing import Storing
from ucm.store.node.touches import Touches
from ucm.store.node.weigh import weigh


class Lookups:
    """All lookups under way."""

    def __init__(self, parts: NodeParts, storing: Storing) -> None:
        self._slots = parts.slots
        self._tier = parts.tier
        self._reads = parts.reads
        self._count = parts.count
        self._notices = parts.notices
        self._clock = parts.clock
        self._on_met = storing.met
        self.touches = Touches(parts)
        self._open: dict[tuple[Connection, int], LookupJob] = {}
        self._again = PromisedAgain(parts, self._go_on)
        self.fills = Fills(parts.slots, storing.writeback, self._on_news, self._again)
        self._looks = [Looks(parts, self._on_looked, self._again.rests)]
        self._far, self._far_writeback = parts.far, storing.far
        # The first promised block that near lacked when it was asked, and why it will go on lacking
        # it, if it will: far has the last word.
        self._not_near: dict[LookupJob, tuple[int, Outcome]] = {}
        if parts.far is not None:
            self._looks.append(Looks(parts.far, self._on_looked_far, self._again.rests))
        self._heads = Heads(parts, storing.writeback, self._answer_if_settled)
        self._page_reads = PageReads(parts, self.fills, self._again, self._go_on)

    @property
    def num_open(self) -> int:
        return len(self._open)

    # -- start and end ---------------------------------------------------------------------

    def start(self, connection: Connection, namespace: OpenedNamespace, message: p.Lookup) -> None:
        lookup = (connection, message.id)
        if lookup in self._open or lookup in connection.session.pinned:
            raise ProtocolError(f"lookup {message.id} was not released")
        job = LookupJob(
            connection,
            namespace,
            message,
            slots=self._slots,
            waiting=self.fills.waiting,
            clock=self._clock,
        )
        self._open[lookup] = job
        self._count("lookups", 1)
        self.touch(job.keys[: job.read_from])
        self._heads.scan(job)
        self._look_in_memory(job)
        self._leave_out_unreachable(job)
        self._go_on(job)

    def _leave_out_unreachable(self, job: LookupJob) -> None:
        """Nobody is asked for what lies in storage that hangs, or where there is none."""
        has_storage = bool(self._reads.pools)
        if has_storage and not self._reads.num_stalled:
            return
        for i in job.unknown(most=len(job.keys)):
            if has_storage and self._reads.is_stalled(job.keys[i]):
                job.lose(i, Outcome.TIMEOUT)
                break
            if not has_storage and i >= job.promised:
                job.lose(i, Outcome.NEVER_STORED)
                break

    def withdraw(self, connection: Connection, lookup_id: int) -> None:
        """Ends a lookup that is not answered yet, if there is one. Reads under way go on; their
        pages stay as hits for others."""
        job = self._open.pop((connection, lookup_id), None)
        if job is not None:
            job.close(keep=job.read_from)
            self._forget(job)

    def _forget(self, job: LookupJob) -> None:
        for looks in self._looks:
            looks.forget(job)
        self._not_near.pop(job, None)
        self._page_reads.forget(job)
        self._again.forget(job)

    def withdraw_all(self, connection: Connection) -> None:
        for lookup_id in [number for owner, number in self._open if owner is connection]:
            self.withdraw(connection, lookup_id)

    def tick(self) -> None:
        """Settles lookups whose deadline has passed for what is there."""
        self.touches.tick()
        now_s = self._clock()
        for job in [job for job in self._open.values() if job.deadline_s <= now_s]:
            first_open = job.first_open()
            if first_open is not None:
                is_late = first_open < job.promised and not self._is_storage_slow(job, first_open)
                job.lose(first_open, Outcome.LATE if is_late else Outcome.TIMEOUT)
            job.head_probes = 0
            self._answer_if_settled(job)

    def wait_at_least(self, wait_s: float) -> None:
        """No deadline is nearer than that."""
        until_s = self._clock() + wait_s
        for job in self._open.values():
            job.deadline_s = max(job.deadline_s, until_s)

    def _is_storage_slow(self, job: LookupJob, i: int) -> bool:
        """It is in storage, and storage is slow with it."""
        slot = self._slots.find(job.keys[i])
        return job.state(i) is BlockState.STORED or (slot is not None and self.fills.is_read(slot))

    def touch(self, keys: Sequence[Key]) -> None:
        """An engine uses these pages, which it has itself: they are as hot as if they were read.
        The head last, or it would be evicted before what nobody finds without it."""
        for key in reversed(keys):
            slot = self._slots.find(key)
            if slot is not None:
                self._slots.touch(slot)

    # -- what is behind the head: bring it here ----------------------------------------------

    def _look_in_memory(self, job: LookupJob) -> None:
        for i in range(job.read_from, len(job.keys)):
            slot = self._slots.find(job.keys[i])
            if slot is None:
                job.not_in_memory(i)
            elif slot.state is SlotState.READY or not job.load:
                job.here(i, slot)
            elif job.keys[i] in job.connection.session.filling and i >= job.promised:
                # This very engine is computing the block: its own prefix cache will have it first.
                job.lose(i, Outcome.BEING_COMPUTED_HERE)
                break
            else:
                job.comes(i, is_fed=not self.fills.is_read(slot))

    def _probe_storage(self, job: LookupJob) -> None:
        if job.closed:
            return
        groups = job.next_probes(self._reads.num_threads)
        asked = [
            each for group in groups for each in self._reads.split(group, lambda i: job.keys[i])
        ]
        job.probes_running += len(asked)
        for pool, blocks in asked:
            job.ask(blocks)
            pool.submit(
                partial(count_there, self._tier, job, blocks),
                partial(self._on_probed, job, blocks),
                # A question costs little, and must not wait behind the pages of others.
                urgent=True,
            )

    def _on_probed(self, job: LookupJob, group: list[int], result: object) -> None:
        job.probes_running -= 1
        leading = result if isinstance(result, int) else 0
        if not job.load:
            # What is read is noted then: it may not be there, where order told.
            self._heads.note_stored(job.keys[i] for i in group[:leading])
        if job.closed:
            return
        job.in_storage(group[:leading])
        missing = [i for i in group[leading:] if job.state(i) is BlockState.ASKED]
        if isinstance(result, Exception) and self._far is None:
            self._again.lookup_failed(job, missing, result)
        elif missing and missing[0] < job.promised:
            job.not_in_storage(missing)
        elif missing and self._far is not None:
            if isinstance(result, Exception):
                self._notices.warn("lookup_failed", result)
            self._probe_far(job, missing, self._far)
        elif missing:
            job.lose(missing[0], Outcome.NEVER_STORED)
        self._go_on(job)

    def _probe_far(self, job: LookupJob, blocks: list[int], far: NodeParts) -> None:
        """What near lacks: what it has is read meanwhile."""
        for pool, some in far.reads.split(blocks, lambda i: job.keys[i]):
            if pool.stalled:
                job.lose(some[0], Outcome.TIMEOUT)
                continue
            job.probes_running += 1
            pool.submit(
                partial(count_there, far.tier, job, some),
                partial(self._on_probed_far, job, some),
                urgent=True,
            )

    def _on_probed_far(self, job: LookupJob, group: list[int], result: object) -> None:
        job.probes_running -= 1
        leading = result if isinstance(result, int) else 0
        if not job.load:
            self._note_far(job, group[:leading])
        if job.closed:
            return
        job.in_storage(group[:leading])
        missing = [i for i in group[leading:] if job.state(i) is BlockState.ASKED]
        if isinstance(result, Exception):
            self._again.lookup_failed(job, missing, result, is_far=True)
        elif missing:
            job.lose(missing[0], Outcome.NEVER_STORED)
        self._go_on(job)

    def _note_far(self, job: LookupJob, blocks: Sequence[int]) -> None:
        assert self._far_writeback is not None
        for i in blocks:
            self._far_writeback.note_stored(job.keys[i])

    def _go_on(self, job: LookupJob) -> None:
        weigh(job)
        if not self._again.rests(job):
            # First: a question would wait for a thread that reads a page, the next pages for it.
            self._probe_storage(job)
            self._page_reads.go_on_with(job)
        for looks in self._looks:
            looks.look(job)
        self._answer_if_settled(job)

    # -- promised, and not here yet --------------------------------------------------------

    def _on_looked(self, job: LookupJob, blocks: Sequence[int], result: object) -> None:
        # Some may have come another way meanwhile.
        missing = [i for i in blocks if job.is_wanted(i)]
        self._not_near.pop(job, None)
        if isinstance(result, Exception):
            if self._far is None:
                self._again.lookup_failed(job, missing, result)
            else:
                self._notices.warn("lookup_failed", result)
                self._note_not_near(job, missing, error_reason(result))
        elif isinstance(result, Looked):
            there = blocks[: result.leading]
            job.in_storage(there)
            if there:
                self._looks[0].found(job, len(there), last_there=result.last_there)
            missing = [i for i in missing if job.is_wanted(i)]
            job.all_there = result.all_there and (self._far is None or not missing)
            if missing and result.last_there and self._far is None:
                job.lose(missing[0], Outcome.EVICTED)
            elif missing:
                lacked = [i for i in missing if i == blocks[result.leading]]
                why = Outcome.EVICTED if result.last_there else Outcome.FINE
                self._note_not_near(job, lacked, why)
        self._go_on(job)

    def _note_not_near(self, job: LookupJob, lacked: Sequence[int], why: Outcome) -> None:
        if lacked:
            self._not_near[job] = lacked[0], why
        self._looks[0].look_later(job)

    def _on_looked_far(self, job: LookupJob, blocks: Sequence[int], result: object) -> None:
        missing = [i for i in blocks if job.is_wanted(i)]
        not_near, why = self._not_near.get(job, (-1, Outcome.FINE))
        if isinstance(result, Exception):
            if why and not_near in missing:
                self._again.lookup_failed(job, [not_near], result, is_far=True)
            else:
                self._notices.warn("lookup_failed", result)
        elif isinstance(result, Looked):
            there = blocks[: result.leading]
            job.in_storage(there)
            if there:
                self._looks[1].found(job, len(there), last_there=result.last_there)
            is_lacked = not_near in blocks[result.leading :][:1] and job.is_wanted(not_near)
            if is_lacked and (result.last_there or why is Outcome.EVICTED):
                job.lose(not_near, Outcome.EVICTED)
        if job.missing():
            self._looks[1].look_later(job)
        self._go_on(job)

    # -- the answer ------------------------------------------------------------------------

    def _on_news(self, job: LookupJob, *, look: bool) -> None:
        for looks in self._looks if look else ():
            looks.look_later(job)
        self._answer_if_settled(job)

    def _answer_if_settled(self, job: LookupJob) -> None:
        if job.closed or not job.is_settled():
            return
        del self._open[job.connection, job.id]
        job.close(keep=job.end)
        self._forget(job)
        num_stored = job.end - job.read_from
        self._count("lookup_blocks_asked", len(job.keys) - job.read_from)
        self._count("lookup_blocks_hit", num_stored)
        self._count("lookup_blocks_refused", job.refused)
        if job.reason:
            self._count(f"lookup_ended_{job.reason}", 1)
        slots = job.slots()
        # Everything before each of these is here or in storage.
        kept = job.keys[: job.end if job.head_stored == job.read_from else job.head_stored]
        self._on_met(job.connection, job.namespace, kept, [None, *kept])
        # What prefill hands over is used once, though two ask for it.
        if job.load and not job.promised:
            self.touches.asked(job.keys)
            self.touches.use(job.namespace, job.keys[: job.end])
        if slots:
            job.connection.session.pinned[job.connection, job.id] = slots
            job.connection.session.heads[job.connection, job.id] = job.keys[: job.read_from]
        else:
            job.connection.asked.end(p.Lookup, job.id)
        job.connection.send(
            p.LookupReply(
                id=job.id,
                offsets=[slot.offset for slot in slots],
                num_stored=num_stored,
                from_files=job.from_files,
                head_stored=job.head_stored,
                reason=job.reason,
                refused=job.refused,
                read_us=int(job.read_s * 1e6),
                brought=sum(i < job.end for i in job.begun),
            )
        )

    def check(self) -> None:
        """Raises AssertionError with the broken sentence if a lookup's law does not hold."""
        for job in self._open.values():
            job.check()
            assert not job.closed, "what is open is not answered"
        self.fills.check()
        self.fills.waiting.check(list(self._open.values()))
