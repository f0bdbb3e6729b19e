"""Frees room in a bucket: tails first, then what was written longest ago. Or tells what would go.

Objects have no time of use, and to touch one is to copy it: so it goes by when pages were written.
A bucket is listed twice. First what it holds is counted by age, then what is older than a time that
follows from that is deleted, as it is met. What is ended in between has freed something, and may be
begun anew. Only pages go, and what lies in quarantine: never a manifest, and nothing that a tier
has not named.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ucm.errors import TierError
from ucm.store.blocks.keys import TailKey
from ucm.store.inspect.bucket_walk import Bounds, FoundPage, OutOfBounds, StoredBucket

_MINUTE_S: Final = 60
_AT_ONCE: Final = 1000
# Whether it is a page, and no tail; and the minute that it was written in.
_Order = tuple[bool, int]
_NOTHING: Final[_Order] = (False, -1)


@dataclass(frozen=True)
class BucketOrder:
    """One of the first three says how much. `quarantine_s`: how long what is damaged stays, 0 for
    ever. With `is_dry` nothing is deleted."""

    free_bytes: int | None = None
    keep_bytes: int | None = None
    older_than_s: float | None = None
    grace_s: float = 120.0
    quarantine_s: float = 0.0
    is_dry: bool = False


@dataclass
class ReclaimedBucket:
    """Of `place`: what its pages took, what was wanted, and what went, or would go. `num_young`
    pages stayed within the grace period. `num_aside` went from quarantine. `problem`: why it ended
    early, for people; what went until then is gone."""

    place: str
    stored_bytes: int = 0
    stored_pages: int = 0
    wanted_bytes: int = 0
    freed_bytes: int = 0
    num_pages: int = 0
    num_young: int = 0
    num_aside: int = 0
    num_requests: int = 0
    seconds: float = 0.0
    is_enough: bool = False
    problem: str = ""


def reclaim_bucket(bucket: StoredBucket, order: BucketOrder, bounds: Bounds) -> ReclaimedBucket:
    """Raises TierError where nothing can be listed, and UcmError out of bounds before that."""
    found = ReclaimedBucket(bucket.place)
    run = _BucketRun(bucket, order, bounds, found, time.time())
    namespaces = bucket.namespaces(bounds)
    try:
        run.count(namespaces)
        run.delete(namespaces)
        run.delete_aside()
        found.is_enough = found.freed_bytes >= found.wanted_bytes
    except (OutOfBounds, TierError) as error:
        found.problem = str(error)
    found.num_requests = bounds.num_requests
    found.seconds = time.monotonic() - bounds.started_s
    return found


@dataclass
class _DeleteBatch:
    """Names that are deleted together. `gone` is told of those that were."""

    delete: Callable[[list[str]], None]
    gone: Callable[[int, int], None]
    names: list[str] = field(default_factory=list)
    nbytes: int = 0

    def add(self, name: str, nbytes: int) -> None:
        self.names.append(name)
        self.nbytes += nbytes
        if len(self.names) == _AT_ONCE:
            self.flush()

    def flush(self) -> None:
        names, nbytes = self.names, self.nbytes
        self.names, self.nbytes = [], 0
        if names:
            self.delete(names)
            self.gone(len(names), nbytes)


class _BucketRun:
    def __init__(
        self,
        bucket: StoredBucket,
        order: BucketOrder,
        bounds: Bounds,
        found: ReclaimedBucket,
        now_s: float,
    ) -> None:
        self._bucket = bucket
        self._order = order
        self._bounds = bounds
        self._found = found
        self._now_s = now_s
        self._last = _NOTHING
        # Of the last minute that goes.
        self._left_bytes = 0

    def count(self, namespaces: list[str]) -> None:
        """Finds out which minute is the last that goes, and how much of it."""
        found, order = self._found, self._order
        by_order: Counter[_Order] = Counter()
        for namespace in namespaces:
            for page in self._bucket.pages_in(namespace, self._bounds):
                if page is None:
                    continue
                found.stored_bytes += page.size_bytes
                found.stored_pages += 1
                if self._age_s(page) < order.grace_s:
                    found.num_young += 1
                elif self._may_go(page):
                    by_order[_order_of(page)] += page.size_bytes
        if order.older_than_s is not None:
            found.wanted_bytes = by_order.total()
        elif order.keep_bytes is not None:
            found.wanted_bytes = max(0, found.stored_bytes - order.keep_bytes)
        else:
            found.wanted_bytes = order.free_bytes or 0
        left_bytes = found.wanted_bytes
        self._last, self._left_bytes = _NOTHING, 0
        for minute in sorted(by_order):
            if left_bytes <= 0:
                return
            self._last, self._left_bytes = minute, left_bytes
            left_bytes -= by_order[minute]

    def delete(self, namespaces: list[str]) -> None:
        """What goes by `count`. What was written since then is young, or stands for what went."""
        if self._last == _NOTHING:
            return
        batch = _DeleteBatch(self._delete, self._pages_gone)
        try:
            for namespace in namespaces:
                for page in self._bucket.pages_in(namespace, self._bounds):
                    if page is not None and self._goes(page):
                        batch.add(page.name, page.size_bytes)
        finally:
            # Also what was found until it ended.
            batch.flush()

    def delete_aside(self) -> None:
        if not self._order.quarantine_s:
            return
        batch = _DeleteBatch(self._delete, self._aside_gone)
        for each in self._bucket.aside(self._bounds):
            if self._now_s - each.modified_s > self._order.quarantine_s:
                batch.add(each.name, each.size_bytes)
        batch.flush()

    def _goes(self, page: FoundPage) -> bool:
        order = _order_of(page)
        if order > self._last or self._age_s(page) < self._order.grace_s or not self._may_go(page):
            return False
        if order == self._last:
            if self._left_bytes <= 0:
                return False
            self._left_bytes -= page.size_bytes
        return True

    def _may_go(self, page: FoundPage) -> bool:
        limit_s = self._order.older_than_s
        return limit_s is None or self._age_s(page) > limit_s

    def _age_s(self, page: FoundPage) -> float:
        return self._now_s - page.modified_s

    def _delete(self, names: list[str]) -> None:
        if not self._order.is_dry:
            self._bounds.num_requests += 1
            self._bucket.objects.delete(names)

    def _pages_gone(self, number: int, nbytes: int) -> None:
        self._found.num_pages += number
        self._found.freed_bytes += nbytes

    def _aside_gone(self, number: int, nbytes: int) -> None:
        self._found.num_aside += number


def _order_of(page: FoundPage) -> _Order:
    return not isinstance(page.key, TailKey), int(page.modified_s // _MINUTE_S)
