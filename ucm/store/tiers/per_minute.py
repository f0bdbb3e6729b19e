"""How often something may be done: so many times in any minute."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

_MINUTE_S = 60.0


class PerMinute:
    """Thread-safe."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self._clock = clock
        self._lock = threading.Lock()
        # When the last ones were, the latest last.
        self._done_s: deque[float] = deque(maxlen=max(1, most))

    def may(self) -> bool:
        """Whether it may be done now; it is counted then."""
        now_s = self._clock()
        with self._lock:
            is_full = len(self._done_s) == self._done_s.maxlen
            if self.most == 0 or (is_full and now_s - self._done_s[0] < _MINUTE_S):
                return False
            self._done_s.append(now_s)
        return True
