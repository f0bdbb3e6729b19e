"""Pages that storage has refused while they are still in memory: written again, met or not.

What is in the way mostly passes: a limit, until room is reclaimed; a mount that fails for a moment.
A page is tried again after `retry_s`, then ever more seldom, for a minute; nothing keeps it in
memory meanwhile. No more than `max_pages` are remembered: what is beyond that is written again when
somebody meets it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ucm.store.blocks.keys import Key
from ucm.store.node.saved import Met
from ucm.store.node.sessions import OpenedNamespace
from ucm.store.node.slots import SlotState, SlotTable

_MOST_S = 60.0
# How long a page is left alone, of the time since it was first refused.
_PAUSE_SHARE = 0.5


class Due(NamedTuple):
    namespace: OpenedNamespace
    page: Met


@dataclass(eq=False, slots=True)
class _Unwritten:
    namespace: OpenedNamespace
    key: Key
    parent: Key | None
    first_s: float
    due_s: float = 0.0


class Retries:
    """Owned by the event loop's thread."""

    def __init__(
        self, slots: SlotTable, max_pages: int, retry_s: float, clock: Callable[[], float]
    ) -> None:
        self._slots = slots
        self._max_pages = max_pages
        self._retry_s = retry_s
        self._clock = clock
        self._pages: dict[Key, _Unwritten] = {}
        self._looked_s = float("-inf")

    def refused(self, namespace: OpenedNamespace, key: Key, parent: Key | None) -> bool:
        """Just now. Returns whether that is the first time."""
        now_s = self._clock()
        page = self._pages.get(key)
        is_first = page is None
        if page is None:
            page = _Unwritten(namespace, key, parent, now_s)
            if len(self._pages) < self._max_pages:
                self._pages[key] = page
        page.due_s = now_s + max(self._retry_s, (now_s - page.first_s) * _PAUSE_SHARE)
        return is_first

    def forget(self, *keys: Key) -> None:
        """They are written, or never can be."""
        for key in keys:
            self._pages.pop(key, None)

    def clear(self) -> None:
        self._pages.clear()

    def due(self) -> list[Due]:
        """What may be tried now. Looks at them only so often that it costs nothing."""
        now_s = self._clock()
        if not self._pages or now_s - self._looked_s < self._retry_s / 4:
            return []
        self._looked_s = now_s
        found = []
        for page in list(self._pages.values()):
            slot = self._slots.find(page.key)
            if slot is None or slot.state is not SlotState.READY or now_s - page.first_s > _MOST_S:
                self.forget(page.key)
            elif page.due_s <= now_s:
                found.append(Due(page.namespace, Met(page.key, page.parent, slot)))
        return found
