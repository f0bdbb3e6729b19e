"""Damaged files leave their place, and no node takes many of them away.

What one node reads is not what everybody reads: a bad cable, a bad page of memory or a bad mount
makes every file look damaged here, and good elsewhere. So a file is moved only when it was read
bad twice, the second time past the page cache, and only `per_minute` times a minute. A file that
stays is absent for this read, like one that was moved.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable

from ucm.errors import TierError
from ucm.store.blocks.blockfile import BlockId
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.backend import Backend

_MINUTE_S = 60.0


class Quarantine:
    """Thread-safe. One for all backends of a tier."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._lock = threading.Lock()
        # When the last files were moved, the latest last.
        self._moved_s: deque[float] = deque(maxlen=max(1, per_minute))

    def move(self, seen: os.stat_result, path: str, backend: Backend, block: BlockId) -> str:
        """Moves what was `seen` at `path` aside, if that is allowed now. Returns what was done, for
        people."""
        if not self._may_move():
            return (
                f"left in its place: {self._per_minute} files were moved aside within a minute, so "
                f"it may be this node that reads badly; look at its memory, network and mount"
            )
        return move_aside(seen, path, backend, block)

    def _may_move(self) -> bool:
        now_s = self._clock()
        with self._lock:
            is_full = len(self._moved_s) == self._moved_s.maxlen
            if self._per_minute == 0 or (is_full and now_s - self._moved_s[0] < _MINUTE_S):
                return False
            self._moved_s.append(now_s)
        return True


def forget_cached(fd: int) -> None:
    """The next read of the file asks storage, not this machine's page cache."""
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        return  # a filesystem without it: the read goes as it goes


def move_aside(seen: os.stat_result, path: str, backend: Backend, block: BlockId) -> str:
    """Moves what was `seen` at `path`, damaged or no file at all, to quarantine. Returns what was
    done, for people.

    A writer may put a good file in its place between the comparison and the rename. That block is
    then lost, which costs one recomputation.
    """
    target = paths.quarantine_path(backend.path, block.fingerprint, block.key)
    try:
        if not os.path.samestat(seen, os.lstat(path)):
            return "already replaced"
        # Neither out of another tree nor into one.
        backend.check_dirs(os.path.dirname(path))
        backend.make_dirs(os.path.dirname(target))
        os.rename(path, target)
    except FileNotFoundError:
        backend.forget_dirs()
        return "already moved aside"
    except TierError as error:
        return f"can't be moved aside: {error}"
    except OSError as error:
        return f"can't be moved aside: {error.strerror}"
    return f"moved to {target}"
