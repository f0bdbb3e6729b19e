"""Tells that a part of storage hangs, and that it answers again. What is asked meanwhile ends as if
nothing were there, and is only counted: nobody who reads logs would know of an outage.
"""

from __future__ import annotations

from collections.abc import Sequence

from ucm.store.node.io_threads import LanePool
from ucm.store.node.lanes import Lanes
from ucm.store.node.notices import Notices


class Stalls:
    """`lanes`: with what is done to them, for people: "read", "written"."""

    def __init__(self, lanes: Sequence[tuple[str, Lanes]], notices: Notices) -> None:
        self._lanes = lanes
        self._notices = notices
        self._told: set[LanePool] = set()

    def tick(self) -> None:
        for doing, lanes in self._lanes:
            if not lanes.num_stalled and not self._told:
                continue
            for pool in lanes.pools:
                self._look(pool, f"{lanes.name_of(pool)} can't be {doing}")

    def _look(self, pool: LanePool, what: str) -> None:
        if pool.stalled and pool not in self._told:
            self._told.add(pool)
            self._notices.warn(
                "storage_hangs",
                f"{what}: {pool.num_overdue} calls have not ended within posix_io_timeout_ms; "
                f"until they do, engines go on without it",
                of=what,
            )
        elif not pool.stalled and pool in self._told:
            self._told.discard(pool)
            self._notices.warn("storage_answers", what.replace("can't", "can"), of=what)
