"""Keeps requests away from an instance that fails.

    CLOSED ──failures in a row──► OPEN ──after a while──► one request tries ──► CLOSED, or OPEN

An instance has two of them: one counts what becomes of its requests, the other its health checks.
A health check knows only that somebody listens, so it clears no failed requests; an answer to a
request clears both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Breaker:
    """Pure but for the clock. See the module."""

    max_failures: int
    open_s: float
    clock: Callable[[], float] = time.monotonic
    failures: int = 0
    closed_again_s: float = 0.0
    _is_trying: bool = False

    @property
    def state(self) -> str:
        if self.failures < self.max_failures:
            return "closed"
        return "open" if self.clock() < self.closed_again_s else "half-open"

    def allows(self) -> bool:
        state = self.state
        return state == "closed" or (state == "half-open" and not self._is_trying)

    def begin(self) -> None:
        self._is_trying = self.state == "half-open"

    def ended(self) -> None:
        """The request that tried is over without a word about the instance."""
        self._is_trying = False

    def succeeded(self) -> None:
        self.failures, self._is_trying = 0, False

    def trip(self) -> None:
        """It is known to fail, without being asked again."""
        self.failures = max(self.failures, self.max_failures - 1)
        self.failed()

    def failed(self) -> None:
        self._is_trying = False
        self.failures += 1
        if self.failures >= self.max_failures:
            self.closed_again_s = self.clock() + self.open_s
