"""The threads in which a node cache clears up what dead writers have left behind.

One for each backend and of its own, so that nothing waits behind it: it may hang in storage for
good. It goes through its backend at the node cache's start, and about once a day. One that isn't
there yet, or was never opened, is looked for again until it is there.
"""

from __future__ import annotations

import logging
import random
from threading import Event, Thread

from ucm.config.settings import StoreSettings
from ucm.store.node.memory import give_way
from ucm.store.tiers.posix.sweep import Sweep, Swept

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 10.0
_HOUR_S = 3600.0
_AGAIN_S = (18 * _HOUR_S, 30 * _HOUR_S)


class Sweeper:
    """Begins at once. `stop` asks it to end, which it does between two calls of the filesystem."""

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._stop = Event()
        self._threads = [
            Thread(target=self._work, args=[path], name=f"ucm-sweep-{number}", daemon=True)
            for number, path in enumerate(settings.storage_backends)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_working(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        self._stop.set()

    def _work(self, path: str) -> None:
        give_way()
        while not self._stop.is_set():
            is_there = self._sweep(path)
            # Nodes that were started together need not all sweep at the same time.
            self._stop.wait(random.uniform(*_AGAIN_S) if is_there else _LOOK_AGAIN_S)

    def _sweep(self, path: str) -> bool:
        """False: there is no backend."""
        settings = self._settings
        sweep = Sweep(
            path,
            stale_s=settings.stale_temp_hours * _HOUR_S,
            dirs_per_s=settings.sweep_dirs_per_s,
            stop=self._stop,
            quarantine_s=settings.quarantine_hours * _HOUR_S,
        )
        swept = sweep.run()
        if swept is not None:
            say(path, swept)
        return swept is not None


def say(path: str, swept: Swept) -> None:
    """A line if something was removed, and one if something could not be."""
    if swept.num_files:
        logger.info(
            "%s: removed %d temporary files of dead writers, %.1f MiB; looked at %d directories",
            path,
            swept.num_files,
            swept.num_bytes / (1 << 20),
            swept.num_directories,
        )
    if swept.num_quarantined:
        logger.info(
            "%s: removed %d damaged files that had been in quarantine for posix_quarantine_hours",
            path,
            swept.num_quarantined,
        )
    if swept.num_emptied:
        logger.info(
            "%s: removed %d directories that had been empty for a day", path, swept.num_emptied
        )
    if swept.problem:
        logger.warning(
            "%s: temporary files of dead writers may be left: %s (and %d more like it)",
            path,
            swept.problem,
            swept.num_problems - 1,
        )
