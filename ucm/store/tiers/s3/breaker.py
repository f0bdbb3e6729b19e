"""A server that can't be reached is left alone for a while: then one call tries it, and the others
are refused at once instead of each waiting for its own deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ucm.errors import TierError
from ucm.outcome import Outcome

# In a row: one request may be lost for a reason of its own.
_FAILURES = 3


class BucketBreaker:
    """Thread-safe. Whoever was let through owes one of `worked` and `failed`."""

    def __init__(self, pause_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._pause_s = pause_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._closed_until_s = 0.0
        self._why = ""

    def let_through(self) -> None:
        """Raises TierError while the server is left alone."""
        with self._lock:
            if self._failures < _FAILURES:
                return
            now_s = self._clock()
            if now_s >= self._closed_until_s:
                # This call is the one that tries; what hangs in it keeps the others out no longer.
                self._closed_until_s = now_s + self._pause_s
                return
            why = self._why
        raise TierError(f"left alone for a moment, because {why}", reason=Outcome.IO_ERROR)

    def worked(self) -> None:
        """The server has answered, whatever it said."""
        if self._failures:
            with self._lock:
                self._failures = 0

    def failed(self, why: str) -> None:
        with self._lock:
            self._failures += 1
            self._why = why
            self._closed_until_s = self._clock() + self._pause_s
