"""Whose turn it is to ask the node cache: two bounds, so that nobody's wait holds up others.

A lookup that waits for promised blocks may be open for long, an ordinary one is answered at once.
So they don't share places. Beyond `max_handoffs` that wait, the one that has waited longest is
crowded out: it asks again, as an ordinary one, for what is there by now. Beyond `max_lookups` that
ask, the next waits for its turn, at most as long as an answer may take. Pure.
"""

from __future__ import annotations

from enum import Enum


class Turn(Enum):
    NOW = "ask"
    LATER = "wait, and see again"
    NEVER = "it did not come in time"


class Turns:
    """Owned by the engine's thread. A lookup that `waits` is one with a promise that has time."""

    def __init__(self, *, max_lookups: int, max_handoffs: int, timeout_s: float) -> None:
        self._max_lookups = max_lookups
        self._max_handoffs = max_handoffs
        self._timeout_s = timeout_s
        self._asking: set[int] = set()
        # Lookups and their requests, the oldest first.
        self._waiting: dict[int, str] = {}
        # Until when a request waits for its turn.
        self._by_s: dict[str, float] = {}

    def turn_of(self, request_id: str, *, waits: bool, now_s: float) -> Turn:
        if waits or len(self._asking) < self._max_lookups:
            self.forget(request_id)
            return Turn.NOW
        by_s = self._by_s.setdefault(request_id, now_s + self._timeout_s)
        return Turn.NEVER if now_s > by_s else Turn.LATER

    def asks(self, lookup_id: int, request_id: str, *, waits: bool) -> str | None:
        """The request asks. Returns another that is crowded out by it."""
        if not waits:
            self._asking.add(lookup_id)
            return None
        oldest = None
        if len(self._waiting) >= self._max_handoffs:
            oldest = self._waiting.pop(next(iter(self._waiting)))
        self._waiting[lookup_id] = request_id
        return oldest

    def ended(self, lookup_id: int) -> None:
        self._asking.discard(lookup_id)
        self._waiting.pop(lookup_id, None)

    def forget(self, request_id: str) -> None:
        """It waits for its turn no more."""
        self._by_s.pop(request_id, None)
