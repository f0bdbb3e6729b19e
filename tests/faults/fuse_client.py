"""What a client of shared storage remembers, beside what the kernel does: two ways to be blind.

Listings for a while, as sshfs does. And that a name was missing, until its folder's time of change
is another, as NFS does: what came in the same tick of the server's clock is never seen.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

Listing = list[tuple[int, int, bytes]]


class Client:
    """Of one mount. Thread-safe."""

    def __init__(self, *, listing_timeout_s: float, believes_until_changed: bool) -> None:
        self._listing_timeout_s = listing_timeout_s
        self._believes_until_changed = believes_until_changed
        self._lock = threading.Lock()
        self._listings: dict[int, tuple[float, Listing]] = {}
        self._absent: dict[tuple[int, bytes], int] = {}

    def listing(self, node: int, make: Callable[[], Listing]) -> Listing:
        with self._lock:
            since_s, listing = self._listings.get(node, (float("-inf"), []))
            if time.monotonic() - since_s >= self._listing_timeout_s:
                since_s, listing = self._listings[node] = time.monotonic(), make()
            return listing

    def believes_absent(self, node: int, name: bytes, folder: os.stat_result) -> bool:
        with self._lock:
            return self._absent.get((node, name)) == folder.st_mtime_ns

    def found_absent(self, node: int, name: bytes, folder: os.stat_result) -> None:
        if self._believes_until_changed:
            with self._lock:
                self._absent[node, name] = folder.st_mtime_ns
