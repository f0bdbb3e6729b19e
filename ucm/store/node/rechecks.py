"""Pages in memory that were seen in storage once: are their files still there?

A lookup or a dump that meets such a page goes on at once; the answer decides about the next one.
What has gone is queued from memory. No more than `max_pages` of a lane are asked about at a time:
what is beyond that is asked about when it is met again. Where each is a request, half of the
threads at most are busy with them: lookups and reads go on meanwhile.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node.io_threads import LanePool, error_reason
from ucm.store.node.parts import NodeParts
from ucm.store.node.saved import Met
from ucm.store.node.sessions import OpenedNamespace
from ucm.store.node.slots import SlotState, SlotTable
from ucm.store.node.writeback import WriteBack
from ucm.store.tiers.tier import held_of

_MAX_GROUP = 64
_Group: TypeAlias = tuple[OpenedNamespace, list[Met]]


def ready_pages(slots: SlotTable, keys: Sequence[Key], parents: Sequence[Key | None]) -> list[Met]:
    """Those of `keys` that are in memory."""
    found = [(slots.find(key), parent) for key, parent in zip(keys, parents, strict=False)]
    return [
        Met(slot.key, parent, slot)
        for slot, parent in found
        if slot is not None and slot.key is not None and slot.state is SlotState.READY
    ]


class Rechecks:
    """Owned by the event loop's thread."""

    def __init__(self, parts: NodeParts, writeback: WriteBack) -> None:
        self._tier = parts.tier
        self._reads = parts.reads
        self._writeback = writeback
        self._slots = parts.slots
        self._count = parts.count
        self._notices = parts.notices
        self._max_pages = parts.limits.max_write_pages
        self._open: defaultdict[LanePool, set[Key]] = defaultdict(set)
        self._waiting: defaultdict[LanePool, deque[_Group]] = defaultdict(deque)
        self._running: Counter[LanePool] = Counter()

    def meet(self, namespace: OpenedNamespace, pages: Sequence[Met]) -> list[Key]:
        """Somebody counts on these READY pages. Returns those that are neither saved nor queued."""
        unsaved, old = self._writeback.meet(namespace, pages)
        for pool, pages_there in self._reads.split(old, lambda page: page.key):
            self._ask(namespace, pool, pages_there)
        return unsaved

    def _ask(self, namespace: OpenedNamespace, pool: LanePool, pages: list[Met]) -> None:
        asked = self._open[pool]
        fresh = [page for page in pages if page.key not in asked]
        del fresh[max(0, self._max_pages - len(asked)) :]
        asked.update(page.key for page in fresh)
        size = 1 if self._tier.is_by_request else _MAX_GROUP
        groups = (fresh[start : start + size] for start in range(0, len(fresh), size))
        self._waiting[pool].extend((namespace, group) for group in groups)
        self._go_on(pool)

    def _go_on(self, pool: LanePool) -> None:
        waiting = self._waiting[pool]
        most = max(1, pool.num_threads // 2) if self._tier.is_by_request else self._max_pages
        while waiting and self._running[pool] < most:
            namespace, group = waiting.popleft()
            self._running[pool] += 1
            pool.submit(
                partial(held_of, self._tier, namespace.tier, [page.key for page in group]),
                partial(self._on_asked, namespace, pool, group),
            )

    def _on_asked(
        self, namespace: OpenedNamespace, pool: LanePool, group: list[Met], result: object
    ) -> None:
        self._open[pool].difference_update(page.key for page in group)
        self._running[pool] -= 1
        self._go_on(pool)
        if not isinstance(result, list):
            self._notices.warn("recheck_failed", result)
            self._writeback.refuse([page.key for page in group], error_reason(result))
            return
        for page, is_held in zip(group, result, strict=True):
            if is_held:
                self._writeback.note_stored(page.key)
            else:
                self._lost(namespace, page)

    def _lost(self, namespace: OpenedNamespace, page: Met) -> None:
        self._count("saved_page_gone", 1)
        self._notices.warn(
            "page gone from storage", f"{page.key.hex()}: its file is not there any more"
        )
        self._writeback.note_gone(page.key)
        slot = self._slots.find(page.key)
        if slot is page.slot and slot.state is SlotState.READY:
            self._writeback.enqueue(namespace, page.key, page.parent, slot)
        else:
            self._writeback.refuse([page.key], Outcome.GONE)
