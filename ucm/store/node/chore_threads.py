"""The threads for what a tier wants done in the background: one for each chore.

Each gives way to everybody, and may hang in storage for good: nobody waits for one, but a node
cache that leaves, for a moment.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from threading import Thread

from ucm.store.blocks.keys import Key
from ucm.store.node.io_threads import Loop
from ucm.store.node.memory import give_way
from ucm.store.tiers.tier import Chore

_logger = logging.getLogger(__name__)


class ChoreThreads:
    """Begin at once. `on_removed` is told on the loop's thread of the pages that they took out of
    storage."""

    def __init__(
        self, chores: Sequence[Chore], loop: Loop, on_removed: Callable[[list[Key]], None]
    ) -> None:
        self._chores = chores
        self._loop = loop
        self._on_removed = on_removed
        self._threads = [
            Thread(target=self._work, args=[chore], name=f"ucm-chore-{number}", daemon=True)
            for number, chore in enumerate(chores)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_working(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Asks them to end, which they do between two calls of the filesystem."""
        for chore in self._chores:
            chore.stop()

    def counters(self) -> dict[str, int]:
        """Summed over all."""
        total: Counter[str] = Counter()
        for chore in self._chores:
            total.update(chore.counters())
        return dict(total)

    def _work(self, chore: Chore) -> None:
        give_way()
        try:
            chore.run(partial(self._tell, chore))
        except Exception:
            _logger.exception("%s: its reclaim has ended by an error of its own", chore.name)

    def _tell(self, chore: Chore, keys: list[Key]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._on_removed, keys)
        except RuntimeError:
            chore.stop()  # the loop has closed: the process is leaving
