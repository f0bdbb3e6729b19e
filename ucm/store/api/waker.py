"""What wakes a store's thread, from any other thread of its process, and from no other process.

After a fork the child has the store's objects and not its thread: what it asks would wait for
nobody. It is told so at once.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

from ucm.errors import TaskFailed


class Waker:
    """Owns one descriptor, until `close`. The thread that is woken polls it, and clears it."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def is_of_this_process(self) -> bool:
        return os.getpid() == self._pid

    def check_process(self) -> None:
        """Raises TaskFailed in a process that was forked from the one that opened the store."""
        if not self.is_of_this_process:
            raise TaskFailed(
                f"this process was forked from {self._pid}, which opened the store: it has to open "
                f"one of its own"
            )

    def fileno(self) -> int:
        return self._fd

    def wake(self) -> None:
        with self._lock:
            if self._fd >= 0:
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        with self._lock:
            os.close(self._fd)
            self._fd = -1
