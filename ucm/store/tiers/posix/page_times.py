"""The times of page files: their scores (score.py), by what this node remembers (recall.py).

Only a file's owner may give it a time of its choice. What another user wrote gets the time that it
is now, if that is later: such a store goes by last use.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from threading import Lock

from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix.recall import Recall


class PageTimes:
    """Any thread's. Nobody holds the lock while storage is asked."""

    def __init__(self) -> None:
        self._recall = Recall()
        self._lock = Lock()

    def asked(self, keys: Sequence[Key]) -> None:
        """Somebody asks for a prompt of these blocks, in its order."""
        with self._lock:
            self._recall.use(keys, time.time_ns())

    def give_first(self, fd: int, key: Key) -> None:
        """Before the file is published. Where it can't have one, its time is that of the write."""
        now_ns = time.time_ns()
        with self._lock:
            score_ns = self._recall.first_score_ns(key, now_ns)
        with suppress(OSError):
            os.utime(fd, ns=(now_ns, score_ns))

    def touch(self, path: str, key: Key) -> None:
        """It is used: it has changed now, whatever its score. Raises OSError."""
        stored_ns, now_ns = os.stat(path, follow_symlinks=False).st_mtime_ns, time.time_ns()
        with self._lock:
            score_ns = self._recall.used_score_ns(key, stored_ns, now_ns)
        try:
            os.utime(path, ns=(now_ns, score_ns or stored_ns), follow_symlinks=False)
        except PermissionError:
            if stored_ns < now_ns:
                os.utime(path, follow_symlinks=False)
