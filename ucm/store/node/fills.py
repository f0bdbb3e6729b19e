"""Every slot that is being filled: its beginning, its end, and telling those who wait for the page.

Storage fills a slot (a read), or an engine does (a dump). However it ends, three things happen in
one order: the slot moves, the write-back hears of it, and those who wait for the page are told.

    begin_read, begin_dump ──► FILLING ──whole──► READY
                                  ├──gone──► FREE
                                  └──gone, somebody may still write──► ASIDE ──unused──► FREE
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node.io_threads import LanePool
from ucm.store.node.lookup_state import BlockState, LookupJob, Waiting
from ucm.store.node.promised_again import PromisedAgain
from ucm.store.node.sessions import Filling, OpenedNamespace
from ucm.store.node.slots import Slot, SlotState, SlotTable
from ucm.store.node.writeback import WriteBack


class OnNews(Protocol):
    """A lookup has been told of a page that it waited for. `look`: another node may bring it."""

    def __call__(self, job: LookupJob, *, look: bool) -> None: ...


class Fills:
    """Owned by the event loop's thread. Nobody else moves a slot into or out of FILLING, or out of
    ASIDE."""

    def __init__(
        self, slots: SlotTable, writeback: WriteBack, on_news: OnNews, again: PromisedAgain
    ) -> None:
        self.waiting = Waiting()
        self._slots = slots
        self._writeback = writeback
        self._on_news = on_news
        self._again = again
        self._open: dict[Slot, Filling] = {}

    # -- begin -----------------------------------------------------------------------------

    def begin_read(self, key: Key, namespace: OpenedNamespace) -> Filling | None:
        """None: there is no room."""
        return self._begin(key, namespace, from_storage=True)

    def begin_dump(self, key: Key, namespace: OpenedNamespace) -> Filling | None:
        """With a place in the write queue. None: there is no room, here or there."""
        if self._writeback.is_full(key):
            return None
        filling = self._begin(key, namespace, from_storage=False)
        if filling is None:
            return None
        self._writeback.take_place(key)
        for job, i in self.waiting.of(key):
            job.comes(i, is_fed=True)
        return filling

    def _begin(self, key: Key, namespace: OpenedNamespace, *, from_storage: bool) -> Filling | None:
        slot = self._slots.reserve(key, namespace.slot_bytes)
        if slot is None:
            return None
        filling = self._open[slot] = Filling(slot, key, namespace, from_storage)
        return filling

    def is_read(self, slot: Slot) -> bool:
        """It is being filled from storage."""
        filling = self._open.get(slot)
        return filling is not None and filling.from_storage

    # -- end -------------------------------------------------------------------------------

    def dumped(self, filling: Filling, parent: Key | None) -> None:
        """An engine has filled it. `parent`: the block before."""
        del self._open[filling.slot]
        self._slots.ready(filling.slot)
        self._writeback.enqueue(filling.namespace, filling.key, parent, filling.slot)
        self._tell_whole((filling,))

    def were_read(self, fillings: Iterable[Filling], *, from_far: bool = False) -> None:
        """Storage has brought these pages. `from_far`: near lacks them."""
        for filling in fillings:
            del self._open[filling.slot]
            self._slots.ready(filling.slot)
            self._writeback.filled_from_tier(filling.key, is_hit=True, from_far=from_far)
        self._tell_whole(fillings)

    def _tell_whole(self, fillings: Iterable[Filling]) -> None:
        """Who waits for several of these pages has all of them before it hears of any: what
        follows from that costs as much for one as for many."""
        told: dict[LookupJob, None] = {}
        for filling in fillings:
            for job, i in self.waiting.of(filling.key):
                job.here(i, filling.slot, from_files=filling.from_storage)
                told[job] = None
        for job in told:
            self._on_news(job, look=False)

    def gone(
        self,
        filling: Filling,
        reason: Outcome,
        *,
        is_written: bool = False,
        failed_in: LanePool | None = None,
    ) -> None:
        """It will never be there. `is_written`: somebody may write into the slot until `unused`.
        `failed_in`: storage has it, as far as is known, and could not be read there."""
        del self._open[filling.slot]
        if is_written:
            self._slots.set_aside(filling.slot)
        else:
            self._slots.abandon(filling.slot)
        if filling.from_storage:
            self._writeback.filled_from_tier(filling.key, is_hit=False)
        else:
            self._writeback.filling_ended(filling.key)
        self._tell_gone(filling, reason, failed_in)

    def unused(self, slot: Slot) -> None:
        """Nobody writes any more into a slot that was set aside."""
        assert slot.state is SlotState.ASIDE
        self._slots.abandon(slot)

    def _tell_gone(self, filling: Filling, reason: Outcome, failed_in: LanePool | None) -> None:
        for job, i in self.waiting.of(filling.key):
            # What it was told of another block may have ended it.
            if job.state(i) is not BlockState.COMING:
                continue
            look = False
            if reason is Outcome.NEVER_STORED and i < min(job.promised, job.end):
                job.does_not_come(i)
                look = True
            elif failed_in is not None and self._again.tries_again(job, i, failed_in):
                job.does_not_come(i)
                job.in_storage([i])
            else:
                job.lose(i, reason)
            self._on_news(job, look=look)

    def will_not_begin(self, key: Key, reason: Outcome) -> None:
        """An engine has computed a page for which there is no slot."""
        for job, i in self.waiting.of(key):
            if job.is_wanted(i):
                job.lose(i, reason)
                self._on_news(job, look=False)

    def check(self) -> None:
        """Raises AssertionError unless each FILLING slot has one who fills it."""
        slots = [slot for span in self._slots.spans() for slot in span.slots]
        filling = {slot for slot in slots if slot.state is SlotState.FILLING}
        assert filling == set(self._open), "each slot that is being filled was begun here"
        assert all(slot.key == each.key for slot, each in self._open.items())
