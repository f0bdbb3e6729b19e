"""Write-back: committed pages go to the tier, visible in prompt order.

A block's file is published only after the file of the block before it, so on storage the last
block of a prompt stands for all of them; where publishing is what takes the time, nearly so
(`abreast.py`). Pages are staged (written under a temporary name) in parallel and published in that
order:

    place ──commit──► queued ──staged──► staged ──parent published──► publishing ──► stored
       └── given back    └──────── failed: so does every block after it (see `retries.py`)

A dump takes its place in the queue (`write_places.py`) when its slot is reserved, so what is
committed is queued; a page that is met unsaved takes one if there is one. What is not written is
told: every page that was accepted is in the end in storage, or in a `tell` with the reason. A page
in the queue is pinned, so its slot can't be reused before its bytes are out. While a lane of
storage hangs, pages of the others don't wait for its pages: those behind them are given up.
`saved.py` says what is known of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key, num_tokens_of
from ucm.store.node.abreast import Abreast, Write
from ucm.store.node.io_threads import LanePool
from ucm.store.node.parts import NodeParts
from ucm.store.node.refusing import RefusingLanes
from ucm.store.node.retries import Retries
from ucm.store.node.saved import Met, SavedBook, Saving, TellClients
from ucm.store.node.sessions import OpenedNamespace
from ucm.store.node.slots import Slot, SlotState
from ucm.store.node.write_places import Places
from ucm.store.tiers.tier import Staged


class WriteBack:
    """Owned by the event loop's thread, like the slot table it pins in."""

    def __init__(self, parts: NodeParts, tell: TellClients) -> None:
        self._tier = parts.tier
        self._lanes = parts.writes
        self._slots = parts.slots
        self._page_of = parts.page_of
        self._count = parts.count
        self._notices = parts.notices
        self._tell = tell
        self.refusing = RefusingLanes(parts.writes)
        max_pages, rules = parts.limits.max_write_pages, parts.limits.saving
        self._book = SavedBook(rules, parts.clock)
        self._retries = Retries(parts.slots, max_pages, rules.retry_s, parts.clock)
        self._writes: dict[Key, Write] = {}
        self._abreast = Abreast(self._writes, is_on=parts.tier.publishes_abreast)
        self._places = Places(parts.writes, max_pages)
        # Writes whose parent's slot is still being filled: nothing to queue behind yet.
        self._waiting: dict[Key, list[Write]] = {}
        self._leaving = self._closed = False

    @property
    def depth(self) -> int:
        return len(self._writes)

    def is_full(self, key: Key) -> bool:
        return self._places.is_full(key)

    # -- what is known of a page -----------------------------------------------------------

    def state(self, key: Key) -> Saving:
        if key in self._writes:
            return Saving.QUEUED
        if self._book.is_saved(key):
            return Saving.SAVED
        return Saving.REFUSED if self._book.refusal(key) else Saving.MEMORY_ONLY

    def why_refused(self, key: Key) -> Outcome:
        refusal = self._book.refusal(key)
        return refusal.reason if refusal is not None else Outcome.AFTER_FAILED

    def was_stored(self, key: Key) -> bool:
        """Whether this node cache saw `key` in the tier a moment ago."""
        return self._book.is_saved(key)

    def note_stored(self, key: Key) -> None:
        self._retries.forget(key)
        if self._book.note_saved(key):
            self._tell((), [key], Outcome.FINE)

    def note_refused(self, key: Key, reason: Outcome) -> None:
        """Somebody was told that it will be. Who was hears of it when it is saved after all."""
        self._book.note_refused(key, reason)

    def note_gone(self, key: Key) -> None:
        """Storage was asked, and does not have it."""
        self._book.note_gone(key)

    def meet(self, namespace: OpenedNamespace, pages: Sequence[Met]) -> tuple[list[Key], list[Met]]:
        """Somebody counts on these pages, in prompt order. Queues what is not saved. Returns what
        can't be queued now, and what was seen in storage too long ago to be trusted."""
        unsaved: list[Key] = []
        old: list[Met] = []
        refused: list[Key] = []
        for page in pages:
            key = page.key
            if key in self._writes or self._book.is_saved(key):
                continue
            if self._book.was_saved(key):
                old.append(page)
            elif not self._may_retry(page):
                unsaved.append(key)
            elif not self._begin(namespace, page):
                refused.append(key)
        self._drop(refused, Outcome.QUEUE_FULL)
        return unsaved, old

    def _is_lost(self, key: Key | None) -> bool:
        """Storage has refused it, and it is not on its way again."""
        return key is not None and key not in self._writes and self._book.refusal(key) is not None

    def _is_held_up(self, key: Key, parent: Key | None) -> bool:
        """It would wait for a page of another lane, which hangs."""
        before = None if parent is None else self._writes.get(parent)
        return before is not None and before.pool.stalled and before.pool is not self._lanes.of(key)

    def _may_retry(self, page: Met) -> bool:
        if self._is_lost(page.parent) or self._is_held_up(page.key, page.parent):
            return False
        refusal = self._book.refusal(page.key)
        has_failed = refusal is not None and refusal.reason is not Outcome.AFTER_FAILED
        return not has_failed or self._book.may_retry(page.key)

    # -- the queue -------------------------------------------------------------------------

    def take_place(self, key: Key) -> bool:
        """For a slot that is to be filled. False: the queue has no place left."""
        return self._places.take(key)

    def enqueue(self, namespace: OpenedNamespace, key: Key, parent: Key | None, slot: Slot) -> None:
        """Queues the READY page in `slot`, at the place that was taken for it. Refuses it when
        there is none, or the block before it was refused: nothing would lead to its file."""
        if key in self._writes:
            return
        is_vain = self._is_lost(parent) or self._is_held_up(key, parent)
        reason = Outcome.AFTER_FAILED if is_vain else Outcome.FINE
        if reason or not self._begin(namespace, Met(key, parent, slot)):
            self._places.give_back(key)
            if is_vain:
                self._retries.refused(namespace, key, parent)
            self._drop([key], reason or Outcome.QUEUE_FULL)
            self._drop_waiting(key)

    def _begin(self, namespace: OpenedNamespace, page: Met) -> bool:
        """False if there is no place for it."""
        key, slot = page.key, page.slot
        pool = None if self._closed else self._places.enter(key)
        if pool is None:
            return False
        before = None if page.parent is None else self._writes.get(page.parent)
        write = Write(namespace, key, page.parent, slot, pool, before)
        write.keep_waiting(self._waiting.pop(key, []))
        self._writes[key] = write
        self._slots.pin(slot)
        pool.submit(
            partial(
                self._tier.stage,
                namespace.tier,
                key,
                self._page_of(slot),
                num_tokens=num_tokens_of(key, block_tokens=namespace.block_tokens),
            ),
            partial(self._on_staged, write),
            on_overdue=partial(self._count, "write_overdue"),
        )
        return True

    def filling_ended(self, key: Key) -> None:
        """The slot of `key` was given up before it was READY: its place is free, and what waited
        for it is dropped."""
        self._places.give_back(key)
        self._drop_waiting(key)

    def filled_from_tier(self, key: Key, *, is_hit: bool, from_far: bool = False) -> None:
        """The slot of `key` was not filled by an engine but read: it is stored, or is not."""
        if not is_hit:
            self._book.note_gone(key)
            self._drop_waiting(key)
            return
        self.note_stored(key)
        self.goes_on_after(key)

    def goes_on_after(self, key: Key) -> None:
        for write in self._waiting.pop(key, []):
            self._publish_in_order(write)

    def leave(self) -> None:
        """The process is to end: from now on nothing waits for a block that isn't queued."""
        self._leaving = True
        self._retries.clear()
        for key in list(self._waiting):
            self._drop_waiting(key)

    def close(self) -> None:
        """Nothing is queued any more: nobody would see it through."""
        self._closed = True

    def _drop_waiting(self, key: Key) -> None:
        for write in self._waiting.pop(key, []):
            lost = [each.key for each in self._doom(write)]  # nothing will ever lead to these
            self._retries.forget(*lost)
            self._drop(lost, Outcome.AFTER_FAILED)

    def _on_staged(self, write: Write, result: object) -> None:
        if isinstance(result, TierError):
            self._fail_write(write, result)
            return
        write.staged = result if isinstance(result, Staged) else None
        if write.doomed:
            # What was given up while it was written must never be seen: nothing leads to it.
            self._discard(write)
        elif write.staged is None:
            self._stored(write, "write_already_there")
        else:
            self._publish_in_order(write)

    def _publish_in_order(self, write: Write) -> None:
        parent = write.parent
        write.waits_for = None
        ahead = self._abreast.must_wait_for(write)
        if ahead is not None:
            self._abreast.wait(write, ahead)
            self._publish_abreast(write.pool)
            return
        if parent is not None:
            filling = self._slots.find(parent)
            is_filling = filling is not None and filling.state is SlotState.FILLING
            is_left = is_filling and self._leaving
            if parent in self._writes or self._is_lost(parent) or is_left:
                self._lose(self._doom(write), "dump_dropped", Outcome.AFTER_FAILED)
                return
            if is_filling:
                self._waiting.setdefault(parent, []).append(write)
                return
        self._publish(write)
        self._publish_abreast(write.pool)

    def _publish_abreast(self, pool: LanePool) -> None:
        while (write := self._abreast.next(pool)) is not None:
            self._publish(write)

    def _publish(self, write: Write) -> None:
        staged = write.staged
        assert staged is not None
        self._abreast.begins(write)
        write.pool.submit(
            partial(self._tier.publish, staged),
            partial(self._on_published, write),
            on_overdue=partial(self._count, "write_overdue"),
            # Before more staging: the head of a long prompt is to be had while its end is written.
            urgent=True,
        )

    def _on_published(self, write: Write, result: object) -> None:
        self._abreast.ends(write)
        if isinstance(result, TierError):
            self._fail_write(write, result)
        else:
            write.staged = None
            self.refusing.has_taken(write.pool)
            self._stored(write, "write_done")
        self._publish_abreast(write.pool)

    def _stored(self, write: Write, counter: str) -> None:
        self._count(counter)
        self.note_stored(write.key)
        self._finish(write)
        for after in write.begin_after():
            self._publish_in_order(after)

    # -- what is not written ---------------------------------------------------------------

    def tick(self) -> None:
        """Tries again what was refused. Gives up what waits for a lane that hangs and is of another
        one. What is of that lane itself stays: it may come back."""
        for namespace, page in self._retries.due():
            has_to_wait = page.key in self._writes or self._lanes.of(page.key).stalled
            if not has_to_wait and self._may_retry(page) and not self.is_full(page.key):
                self._begin(namespace, page)
        if not self._lanes.num_stalled:
            return
        for write in [each for each in self._writes.values() if each.pool.stalled]:
            held_up = [after for after in write.after if after.pool is not write.pool]
            write.after = [after for after in write.after if after.pool is write.pool]
            for after in held_up:
                self._lose(self._doom(after), "dump_dropped", Outcome.AFTER_FAILED)

    def _fail_write(self, write: Write, error: TierError) -> None:
        """Storage has refused it. Nothing will lead to what waits behind it."""
        self._notices.warn(f"write_failed_{error.reason}", error)
        self.refusing.has_refused(write.pool, error.reason)
        lost = self._doom(write)
        self._lose(lost[:1], "write_failed", error.reason)
        self._lose(lost[1:], "dump_dropped", Outcome.AFTER_FAILED)

    def _lose(self, writes: Sequence[Write], what: str, reason: Outcome) -> None:
        """They are tried again, and counted once."""
        for write in writes:
            if self._retries.refused(write.namespace, write.key, write.parent):
                self._count(f"{what}_{reason}")
        self.refuse([write.key for write in writes], reason)

    def _drop(self, keys: Sequence[Key], reason: Outcome) -> None:
        """Never written at all."""
        for _ in keys:
            self._count(f"dump_dropped_{reason}")
        self.refuse(keys, reason)

    def refuse(self, keys: Sequence[Key], reason: Outcome) -> None:
        """Nobody is to promise these."""
        for key in keys:
            self.note_refused(key, reason)
        if keys:
            self._tell(keys, (), reason)

    def _doom(self, write: Write) -> list[Write]:
        """Takes `write` and all that waits behind it out of the queue; returns them, it first."""
        doomed, lost = [write], []
        while doomed:
            current = doomed.pop()
            if not current.doomed:
                lost.append(current)
            current.doomed = True
            doomed.extend(current.take_behind())
            self._discard(current)
        return lost

    def _discard(self, write: Write) -> None:
        staged, write.staged = write.staged, None
        if staged is not None:
            write.pool.submit(partial(self._tier.discard, staged), lambda _: None, urgent=True)
        self._finish(write)

    def _finish(self, write: Write) -> None:
        # A doomed write ends twice: when it fails, and when its staging returns. By then the queue
        # may hold another write of the same key.
        if self._writes.get(write.key) is write:
            del self._writes[write.key]
            write.has_ended = True
            self._places.leave(write.pool)
            self._slots.unpin(write.slot)
