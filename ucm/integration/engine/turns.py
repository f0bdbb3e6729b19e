"""Whose turn it is to ask the node cache: two bounds, so that nobody's wait holds up others.

A lookup that waits for promised blocks may be open for long, an ordinary one is answered at once.
So they don't share places. Beyond `max_handoffs` that wait, the one that has waited longest gives
its promise up (`crowded`): it asks again, as an ordinary one, for what is there by now. Beyond
`max_lookups` that ask, the next waits for its turn, at most as long as an answer may take. Pure.
"""

from __future__ import annotations

from dataclasses import replace

from ucm.integration.engine.prompt import RequestState
from ucm.outcome import Outcome


class Turns:
    """Owned by the engine's thread."""

    def __init__(self, *, max_lookups: int, max_handoffs: int, timeout_s: float) -> None:
        self._max_lookups = max_lookups
        self._max_handoffs = max_handoffs
        self._timeout_s = timeout_s
        self._asking: set[int] = set()
        # The oldest first.
        self._waiting: dict[int, RequestState] = {}

    def must_wait(self, state: RequestState, now_s: float) -> bool:
        """Whether this request can't ask now. With `no_loads` it will not ask at all: its turn did
        not come in time."""
        if _waits(state, now_s) or len(self._asking) < self._max_lookups:
            state.turn_by_s = None
            return False
        if state.turn_by_s is None:
            state.turn_by_s = now_s + self._timeout_s
        if now_s > state.turn_by_s:
            state.no_loads, state.end_reason = True, Outcome.TIMEOUT
        return True

    def asks(self, lookup_id: int, state: RequestState, now_s: float) -> RequestState | None:
        """The request asks. Returns another whose lookup is to be withdrawn for it."""
        if not _waits(state, now_s):
            self._asking.add(lookup_id)
            return None
        oldest = None
        if len(self._waiting) >= self._max_handoffs:
            oldest = self._waiting.pop(next(iter(self._waiting)))
            if oldest.promise is not None:
                oldest.promise = replace(oldest.promise, void=Outcome.CROWDED)
        self._waiting[lookup_id] = state
        return oldest

    def ended(self, lookup_id: int) -> None:
        self._asking.discard(lookup_id)
        self._waiting.pop(lookup_id, None)


def _waits(state: RequestState, now_s: float) -> bool:
    return state.promise is not None and state.promise.left_s(now_s) > 0
