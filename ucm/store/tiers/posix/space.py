"""A reserve of free space: what is never written into.

A filesystem that is full hurts whoever shares it, and slows down well before. So nothing is written
while less is free than the reserve: what `min_free_gb` says, or else 5% of the filesystem and at
least the pages of one full write queue, but never more than a fifth of it, so that a small
filesystem can be used at all.

Free space is looked at once a second and before anything is refused; what is written meanwhile is
taken off. What a filesystem
doesn't tell (0 blocks of 0, as some clusters say) is not taken for full.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.tiers.posix.quotas import Quotas
from ucm.store.tiers.posix.reclaim_plan import ReclaimRules

_DEFAULT_SHARE = 0.05
_MOST_SHARE = 0.2
_LOOK_EVERY_S = 1.0
_GIB = 1 << 30


@dataclass(frozen=True)
class Space:
    """Of a filesystem, as anybody may use it."""

    total_bytes: int
    free_bytes: int


def reserve_bytes(space: Space, *, min_free_bytes: int | None, queue_bytes: int) -> int:
    """What has to stay free. 0 where the filesystem's size is unknown."""
    if min_free_bytes is not None or space.total_bytes == 0:
        return min_free_bytes or 0
    wanted = max(int(space.total_bytes * _DEFAULT_SHARE), queue_bytes)
    return min(wanted, int(space.total_bytes * _MOST_SHARE))


def look(path: str) -> Space:
    """Raises OSError."""
    of = os.statvfs(path)
    return Space(of.f_blocks * of.f_frsize, of.f_bavail * of.f_frsize)


@dataclass(frozen=True, kw_only=True)
class FreeSpace:
    """What stays free: `min_free_bytes`, 0 for nothing, or None for the default (`reserve_bytes`),
    which is at least what a queue of `queue_pages` may still write; and what is beyond `quotas`,
    which are kept by `rules`."""

    min_free_bytes: int | None = 0
    queue_pages: int = 0
    quotas: Quotas = field(default_factory=Quotas)
    rules: ReclaimRules = field(default_factory=ReclaimRules)


NONE_FREE = FreeSpace()


class SpaceReserve:
    """Of the filesystem below one backend. Thread-safe."""

    def __init__(
        self,
        path: str,
        free: FreeSpace,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._free = free
        self._clock = clock
        self._lock = threading.Lock()
        self._space = Space(0, 0)
        self._looked_s = float("-inf")
        self._written_bytes = 0

    def take(self, file_bytes: int) -> None:
        """A file of this size is about to be written. Raises TierError if it must not, and OSError
        if the filesystem can't tell."""
        if self._free.min_free_bytes == 0:
            return  # the filesystem itself says when it is full
        with self._lock:
            now_s = self._clock()
            if now_s - self._looked_s < _LOOK_EVERY_S and self._fits(file_bytes):
                self._written_bytes += file_bytes
                return
            self._look_anew(file_bytes, now_s)
            self._written_bytes = file_bytes

    def check(self, file_bytes: int) -> None:
        """`take`, of a file that isn't written yet, and where the filesystem itself is full."""
        with self._lock:
            self._look_anew(file_bytes, self._clock())

    def _look_anew(self, file_bytes: int, now_s: float) -> None:
        try:
            self._space, self._looked_s = look(self._path), now_s
        except FileNotFoundError:
            return  # the backend is not there: whoever writes will say so
        # Of what others write this moment the look has seen a part; a few pages at most.
        self._written_bytes = 0
        if self._fits(file_bytes):
            return
        free_bytes, keep_bytes = self._space.free_bytes, self._kept(file_bytes)
        raise TierError(
            f"{self._path}: {free_bytes / _GIB:.2f} GiB are free, and {keep_bytes / _GIB:.2f} GiB "
            f"have to stay so (min_free_gb): nothing is written until there is more",
            reason=Outcome.FULL,
        )

    def _fits(self, file_bytes: int) -> bool:
        left_bytes = self._space.free_bytes - self._written_bytes - file_bytes
        return self._space.total_bytes == 0 or left_bytes >= self._kept(file_bytes)

    def _kept(self, file_bytes: int) -> int:
        return reserve_bytes(
            self._space,
            min_free_bytes=self._free.min_free_bytes,
            queue_bytes=self._free.queue_pages * file_bytes,
        )
