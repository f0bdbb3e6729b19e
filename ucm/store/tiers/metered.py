"""A tier that counts what goes through another one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from ucm.store.blocks.keys import Key
from ucm.store.tiers.tier import PageRead, ReadStatus, Staged, Tier, TierNamespace
from ucm.store.tiers.wrapper import WrapperTier


class MeasuredTier(WrapperTier):
    """Keeps totals of pages, bytes and time.

    Bytes are those of pages that were read well or became visible; time is that of all calls,
    summed over the threads that make them. A call takes microseconds at least and the lock is held
    for a few additions.
    """

    def __init__(self, tier: Tier, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__(tier)
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        self._read = _Total()
        self._write = _Total()

    def totals(self) -> dict[str, int]:
        """Since this object was made, as the node cache's counters: `tier_read_bytes`,
        `tier_read_us`, `tier_read_pages`, `tier_read_errors`, and the same of `write`. Errors are
        pages that were damaged, and calls that failed."""
        with self._lock:
            return {**self._read.named("tier_read"), **self._write.named("tier_write")}

    def read_all(
        self, namespace: TierNamespace, keys: Sequence[Key], pages: Sequence[memoryview]
    ) -> list[PageRead]:
        started_ns = self._clock_ns()
        reads = super().read_all(namespace, keys, pages)
        num_hits = sum(read.status is ReadStatus.HIT for read in reads)
        num_absent = sum(read.status is ReadStatus.ABSENT for read in reads)
        num_errors = len(reads) - num_hits - num_absent
        self._add(self._read, started_ns, namespace, num_pages=num_hits, num_errors=num_errors)
        return reads

    def stage(
        self, namespace: TierNamespace, key: Key, page: memoryview, *, num_tokens: int
    ) -> Staged | None:
        started_ns = self._clock_ns()
        num_errors = 1
        try:
            staged = super().stage(namespace, key, page, num_tokens=num_tokens)
            num_errors = 0
        finally:
            self._add(self._write, started_ns, namespace, num_errors=num_errors)
        return staged

    def publish(self, staged: Staged) -> None:
        started_ns = self._clock_ns()
        num_pages = 0
        try:
            super().publish(staged)
            num_pages = 1
        finally:
            self._add(
                self._write,
                started_ns,
                staged.namespace,
                num_pages=num_pages,
                num_errors=1 - num_pages,
            )

    def _add(
        self,
        total: _Total,
        started_ns: int,
        namespace: TierNamespace,
        *,
        num_pages: int = 0,
        num_errors: int = 0,
    ) -> None:
        elapsed_ns = self._clock_ns() - started_ns
        with self._lock:
            total.pages += num_pages
            total.errors += num_errors
            total.nbytes += num_pages * namespace.page_bytes
            total.ns += elapsed_ns


class _Total:
    """Guarded by its owner."""

    def __init__(self) -> None:
        self.pages = self.nbytes = self.ns = self.errors = 0

    def named(self, name: str) -> dict[str, int]:
        return {
            f"{name}_pages": self.pages,
            f"{name}_bytes": self.nbytes,
            f"{name}_us": self.ns // 1000,
            f"{name}_errors": self.errors,
        }
