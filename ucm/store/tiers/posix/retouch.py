"""Gives a directory another time of change, a moment after something new came into it.

A client of NFS that looks for a name within the tick of the server's clock in which the name
appears remembers it as missing, and goes on to believe that until the directory changes in another
tick: for minutes, or for ever. Only a change that is certain to come in a later tick than the name
ends it, whichever client has looked, and whatever it looked for: the page, or a directory above it.
To write a page elsewhere and move it here would only make such looks fewer.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from ucm.errors import TierError

# Ticks are of 1 to 10 ms.
DELAY_S = 0.05
# Storage that hangs is not to fill memory. What is beyond that is found by those who doubt.
_MAX_WAITING = 1 << 14


class Retouch:
    """`touch` may raise OSError and TierError: then somebody else's next change has to do. It is
    called on a thread that is there while something waits, so it may hang."""

    def __init__(self, touch: Callable[[str], None], *, delay_s: float = DELAY_S) -> None:
        self._touch = touch
        self._delay_s = delay_s
        self._lock = threading.Lock()
        # When each is due; the first is due first.
        self._due_s: dict[str, float] = {}
        self._has_thread = False

    def later(self, directory: str) -> None:
        with self._lock:
            # One that waits already waits anew: this change too has to be ticks away by then.
            self._due_s.pop(directory, None)
            if len(self._due_s) < _MAX_WAITING:
                self._due_s[directory] = time.monotonic() + self._delay_s
            must_start = bool(self._due_s) and not self._has_thread
            self._has_thread = self._has_thread or must_start
        if must_start:
            threading.Thread(target=self._run, name="ucm-retouch", daemon=True).start()

    def _run(self) -> None:
        while (due_s := self._next_due_s()) is not None:
            time.sleep(max(0.0, due_s - time.monotonic()))
            for directory in self._take_due():
                with contextlib.suppress(OSError, TierError):
                    self._touch(directory)

    def _next_due_s(self) -> float | None:
        """None: the thread may end."""
        with self._lock:
            due_s = next(iter(self._due_s.values()), None)
            self._has_thread = due_s is not None
            return due_s

    def _take_due(self) -> list[str]:
        with self._lock:
            now_s = time.monotonic()
            due = [directory for directory, due_s in self._due_s.items() if due_s <= now_s]
            for directory in due:
                del self._due_s[directory]
            return due
