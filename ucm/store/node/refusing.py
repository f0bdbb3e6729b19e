"""Lanes of storage that take no pages, as far as that can be known before a page is written.

A receipt is given when a prompt is computed, and by then its pages may still be on their way. Where
storage refuses them, who has the promise waits for it in vain. So what the latest page of a lane
came to is remembered, and what its room looks like when it is opened.
"""

from __future__ import annotations

from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node.io_threads import LanePool
from ucm.store.node.lanes import Lanes


class RefusingLanes:
    """Owned by the event loop's thread."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._reasons: dict[LanePool, Outcome] = {}

    def has_refused(self, pool: LanePool, reason: Outcome) -> None:
        self._reasons[pool] = reason

    def has_no_room(self, lane: int, reason: Outcome) -> None:
        """Nothing was written for that."""
        self._reasons[self._lanes.pools[lane]] = reason

    def has_taken(self, pool: LanePool) -> None:
        self._reasons.pop(pool, None)

    def why(self, key: Key) -> Outcome:
        """Why a page is likely to be refused; FINE if nothing speaks for that."""
        if self._lanes.is_stalled(key):
            return Outcome.TIMEOUT
        if not self._reasons:
            return Outcome.FINE
        return self._reasons.get(self._lanes.of(key), Outcome.FINE)
