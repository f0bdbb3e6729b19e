"""Two tiers behind one memory: each has a write-back of its own, and the near one decides.

What is dumped goes to both at once, each in its own prompt order, by its own threads. A page may
leave memory once near has it and far has it, has refused it, or has dropped it. For far no more
than a part of the memory is kept: what is beyond that is dropped, and written when the page is met
again. So near has its room and its pace whatever far does.

Kept is what either tier keeps: a client is told of a page that near refuses only if far does too.
A page that was read from far is written to near like any that is met unsaved, unless near has
enough to do. One that was read near is taken to be far for a while, because who wrote it near has
written it there as well; then it is looked for when it is met.
"""

from __future__ import annotations

from collections.abc import Sequence

from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node.parts import NodeParts
from ucm.store.node.saved import Met, Saving, TellClients
from ucm.store.node.sessions import OpenedNamespace
from ucm.store.node.slots import Slot
from ucm.store.node.writeback import WriteBack

# Of the memory, for pages that only far still has to get.
_PART_FOR_FAR = 4


class FarWriteBack(WriteBack):
    """Owned by the event loop's thread. Holds nothing up: what it has no room for is dropped."""

    def __init__(self, parts: NodeParts, tell: TellClients) -> None:
        super().__init__(parts, tell)
        self._most_bytes = parts.slots.capacity_bytes // _PART_FOR_FAR
        self._largest_bytes = 0

    def keeps(self, key: Key) -> bool:
        """It is there, or on its way."""
        return self.state(key) in (Saving.QUEUED, Saving.SAVED)

    def was_read_near(self, key: Key) -> None:
        if self.state(key) is Saving.MEMORY_ONLY and not self._book.was_saved(key):
            self.note_stored(key)
        self.goes_on_after(key)

    def _begin(self, namespace: OpenedNamespace, page: Met) -> bool:
        self._largest_bytes = max(self._largest_bytes, namespace.slot_bytes)
        has_room = (self.depth + 1) * self._largest_bytes <= self._most_bytes
        if has_room and super()._begin(namespace, page):
            return True
        if not self._closed:
            self._notices.warn(
                "far_writes_dropped",
                f"{', '.join(self._tier.lanes)} is too slow for what is dumped: {self.depth} pages "
                f"wait for it; pages that it lacks are written when they are used again",
            )
        return False


class NearWriteBack(WriteBack):
    """Owned by the event loop's thread. All that `far` has to hear of it is told by this one."""

    def __init__(self, parts: NodeParts, far: NodeParts, tell: TellClients) -> None:
        super().__init__(parts, self._near_says)
        self.far = FarWriteBack(far, self._far_says)
        self._tell_clients = tell

    def _near_says(self, refused: Sequence[Key], saved: Sequence[Key], reason: Outcome) -> None:
        lost = [key for key in refused if not self.far.keeps(key)]
        if lost or saved:
            self._tell_clients(lost, saved, reason)

    def _far_says(self, refused: Sequence[Key], saved: Sequence[Key], reason: Outcome) -> None:
        lost = [key for key in refused if self.state(key) is Saving.REFUSED]
        if lost or saved:
            self._tell_clients(lost, saved, reason)

    def meet(self, namespace: OpenedNamespace, pages: Sequence[Met]) -> tuple[list[Key], list[Met]]:
        """What far keeps goes to near only as long as that leaves room for what is dumped."""
        met = [
            page
            for page in pages
            if not (self._places.is_half_full(page.key) and self._is_only_far(page.key))
        ]
        unsaved, old = super().meet(namespace, met)
        return [key for key in unsaved if not self.far.keeps(key)], old

    def _is_only_far(self, key: Key) -> bool:
        state = self.state(key)
        is_unsaved = state in (Saving.MEMORY_ONLY, Saving.REFUSED) and not self._book.was_saved(key)
        return is_unsaved and self.far.keeps(key)

    def enqueue(self, namespace: OpenedNamespace, key: Key, parent: Key | None, slot: Slot) -> None:
        # What near refuses at once is told unless far keeps it.
        self.far.enqueue(namespace, key, parent, slot)
        super().enqueue(namespace, key, parent, slot)

    def filling_ended(self, key: Key) -> None:
        self.far.filling_ended(key)
        super().filling_ended(key)

    def filled_from_tier(self, key: Key, *, is_hit: bool, from_far: bool = False) -> None:
        if is_hit and from_far:
            self.far.filled_from_tier(key, is_hit=True)
            self.note_gone(key)
            self.goes_on_after(key)
            return
        if is_hit:
            self.far.was_read_near(key)
        else:
            self.far.filled_from_tier(key, is_hit=False)
        super().filled_from_tier(key, is_hit=is_hit)

    def leave(self) -> None:
        self.far.leave()
        super().leave()

    def tick(self) -> None:
        self.far.tick()
        super().tick()

    def close(self) -> None:
        self.far.close()
        super().close()
