"""Pages in memory that were seen in storage once: are their files still there?

A lookup or a dump that meets such a page goes on at once; the answer decides about the next one.
What has gone is queued from memory. No more than `max_pages` of a lane are asked about at a time:
what is beyond that is asked about when it is met again. Where each is a request, half of the
threads at most are busy with them: lookups and reads go on meanwhile.

Every question is one to the metadata server of all nodes, and a prompt that many ask for has
hundreds of pages. So a few stand for all that are met at once: the first and the last, as storage
drops the ends of prompts first, and some between, others each time. If all of these are there, the
rest is taken to be; if one is not, each is asked about.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
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


@dataclass
class _Round:
    """Pages that were met at once. `rest` are those that others stand for, until one of these is
    gone; `open` groups of questions are to be answered."""

    namespace: OpenedNamespace
    rest: list[Met]
    open: int = 0
    is_whole: bool = True


_Group: TypeAlias = tuple[_Round, list[Met]]


def standing(count: int, turn: int) -> list[int]:
    """Which of `count` pages in prompt order stand for all: about twice the logarithm. In so many
    turns as one of them stands for others, each is among them. Pure."""
    between = max(1, count // max(1, count.bit_length()))
    return sorted({0, count - 1, *range(turn % between, count, between)}) if count else []


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
        # Whose turn it is follows no order: lanes and prompts that take turns would each see the
        # same few of theirs for ever.
        self._turns = Random()
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
        room = max(0, self._max_pages - len(asked))
        places = standing(len(fresh), self._turns.getrandbits(32))
        places = sorted(self._turns.sample(places, min(room, len(places))))
        chosen = [fresh[i] for i in places]
        standing_for = frozenset(places)
        rest = [page for i, page in enumerate(fresh) if i not in standing_for]
        # Those beyond that are old still when they are met again.
        del rest[room - len(chosen) :]
        asked.update(page.key for page in (*chosen, *rest))
        self._put(pool, _Round(namespace, rest), chosen)
        self._go_on(pool)

    def _put(self, pool: LanePool, of: _Round, pages: list[Met]) -> None:
        size = 1 if self._tier.is_by_request else _MAX_GROUP
        groups = [pages[start : start + size] for start in range(0, len(pages), size)]
        of.open += len(groups)
        self._waiting[pool].extend((of, group) for group in groups)

    def _go_on(self, pool: LanePool) -> None:
        waiting = self._waiting[pool]
        most = max(1, pool.num_threads // 2) if self._tier.is_by_request else self._max_pages
        while waiting and self._running[pool] < most:
            of, group = waiting.popleft()
            self._running[pool] += 1
            pool.submit(
                partial(held_of, self._tier, of.namespace.tier, [page.key for page in group]),
                partial(self._on_asked, of, pool, group),
            )

    def _on_asked(self, of: _Round, pool: LanePool, group: list[Met], result: object) -> None:
        self._open[pool].difference_update(page.key for page in group)
        self._running[pool] -= 1
        of.open -= 1
        if isinstance(result, list):
            for page, is_held in zip(group, result, strict=True):
                if is_held:
                    self._writeback.note_stored(page.key)
                else:
                    of.is_whole = False
                    self._lost(of.namespace, page)
        else:
            of.is_whole = False
            self._notices.warn("recheck_failed", result)
            self._writeback.refuse([page.key for page in group], error_reason(result))
        self._decide(of, pool)
        self._go_on(pool)

    def _decide(self, of: _Round, pool: LanePool) -> None:
        """About the rest, once those that stand for it are known."""
        if of.open:
            return
        rest, of.rest = of.rest, []
        if not of.is_whole:
            self._put(pool, of, rest)
            return
        self._open[pool].difference_update(page.key for page in rest)
        for page in rest:
            self._writeback.note_stored(page.key)

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
