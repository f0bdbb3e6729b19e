"""A tier that counts what goes through another one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from ucm.store.blocks.keys import Key
from ucm.store.tiers.tier import PageRead, ReadStatus, Staged, Tier, TierNamespace


class MeasuredTier(Tier):
    """Passes every call on, and keeps totals of pages, bytes and time.

    Bytes are those of pages that were read well or became visible; time is that of all calls,
    summed over the threads that make them. A call takes microseconds at least and the lock is held
    for a few additions.
    """

    def __init__(self, tier: Tier, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._tier = tier
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        self._read = _Total()
        self._write = _Total()

    def totals(self) -> dict[str, int]:
        """Since this object was made, as the node cache's counters: `tier_read_bytes`,
        `tier_read_us`, `tier_read_pages`, and the same of `write`."""
        with self._lock:
            return {**self._read.named("tier_read"), **self._write.named("tier_write")}

    @property
    def lanes(self) -> Sequence[str]:
        return self._tier.lanes

    def lane_of(self, key: Key) -> int:
        return self._tier.lane_of(key)

    def open_lane(self, namespace: TierNamespace, lane: int) -> None:
        self._tier.open_lane(namespace, lane)

    def read_manifest_in(self, lane: int, fingerprint: bytes) -> bytes | None:
        return self._tier.read_manifest_in(lane, fingerprint)

    def unknown_lanes(self) -> Sequence[int]:
        return self._tier.unknown_lanes()

    def look_for_lane(self, lane: int) -> None:
        self._tier.look_for_lane(lane)

    def open_namespace(self, namespace: TierNamespace) -> None:
        self._tier.open_namespace(namespace)

    def contains(self, namespace: TierNamespace, keys: Sequence[Key]) -> int:
        return self._tier.contains(namespace, keys)

    def contains_now(self, namespace: TierNamespace, key: Key) -> bool:
        return self._tier.contains_now(namespace, key)

    def doubt(self, namespace: TierNamespace, key: Key) -> None:
        self._tier.doubt(namespace, key)

    def holds(self, namespace: TierNamespace, key: Key) -> bool:
        return self._tier.holds(namespace, key)

    def read_manifest(self, fingerprint: bytes) -> bytes | None:
        return self._tier.read_manifest(fingerprint)

    def read(self, namespace: TierNamespace, key: Key, page: memoryview) -> PageRead:
        (read,) = self.read_all(namespace, [key], [page])
        return read

    def read_all(
        self, namespace: TierNamespace, keys: Sequence[Key], pages: Sequence[memoryview]
    ) -> list[PageRead]:
        started_ns = self._clock_ns()
        reads = self._tier.read_all(namespace, keys, pages)
        num_hits = sum(read.status is ReadStatus.HIT for read in reads)
        self._add(self._read, started_ns, num_hits, namespace)
        return reads

    def stage(
        self, namespace: TierNamespace, key: Key, page: memoryview, *, num_tokens: int
    ) -> Staged | None:
        started_ns = self._clock_ns()
        try:
            return self._tier.stage(namespace, key, page, num_tokens=num_tokens)
        finally:
            self._add(self._write, started_ns, 0, namespace)

    def publish(self, staged: Staged) -> None:
        started_ns = self._clock_ns()
        num_pages = 0
        try:
            self._tier.publish(staged)
            num_pages = 1
        finally:
            self._add(self._write, started_ns, num_pages, staged.namespace)

    def discard(self, staged: Staged) -> None:
        self._tier.discard(staged)

    def close(self) -> None:
        self._tier.close()

    def _add(
        self, total: _Total, started_ns: int, num_pages: int, namespace: TierNamespace
    ) -> None:
        elapsed_ns = self._clock_ns() - started_ns
        with self._lock:
            total.pages += num_pages
            total.nbytes += num_pages * namespace.page_bytes
            total.ns += elapsed_ns


class _Total:
    """Guarded by its owner."""

    def __init__(self) -> None:
        self.pages = self.nbytes = self.ns = 0

    def named(self, name: str) -> dict[str, int]:
        return {
            f"{name}_pages": self.pages,
            f"{name}_bytes": self.nbytes,
            f"{name}_us": self.ns // 1000,
        }
