"""Reads every page of a bucket and checks every byte, with a few threads and no faster than it may,
while others use it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from ucm.errors import TierError
from ucm.store.blocks.page_names import MANIFEST, fingerprint_in, key_id_in
from ucm.store.inspect.bucket_walk import Bounds, FoundPage, StoredBucket
from ucm.store.inspect.object_check import ObjectChecker
from ucm.store.inspect.page_check import Condition, ExpectedPage
from ucm.store.inspect.verified import VerifiedCounts, VerifyRules
from ucm.store.inspect.verify import not_done

# Pages that are handed to threads ahead, for each of them.
_AHEAD: Final = 4
_NO_BOUND: Final = 1 << 30
# Pages are sorted by key: the first digits tell how far it is.
_DIGITS: Final = 4
_STEPS: Final = 16**_DIGITS


@dataclass
class ReadPace:
    """So many bytes in a second, of all threads together."""

    bytes_per_s: float
    _free_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self, nbytes: int) -> None:
        """Before so many are asked for."""
        with self._lock:
            now_s = time.monotonic()
            begins_s = max(now_s, self._free_s)
            self._free_s = begins_s + nbytes / self.bytes_per_s
        time.sleep(begins_s - now_s)


@dataclass
class BucketVerifier:
    """Of one call."""

    rules: VerifyRules
    counts: VerifiedCounts
    pace: ReadPace

    def run(self, bucket: StoredBucket, on_progress: Callable[[int, int], None]) -> None:
        """Raises TierError where the bucket can't be listed at all; what ends a listing later is a
        folder that can't be read."""
        started_s = time.monotonic()
        bounds = Bounds(_NO_BOUND, _NO_BOUND)
        checker = ObjectChecker(bucket.objects, self.rules.page_key)
        namespaces = bucket.namespaces(bounds)
        running: set[Future[None]] = set()
        with ThreadPoolExecutor(self.rules.num_threads, "ucm-verify") as threads:
            for number, namespace in enumerate(namespaces):
                version = self._version(bucket, namespace)
                try:
                    for page in bucket.pages_in(namespace, bounds):
                        if page is None:
                            self.counts.no_page(is_temporary=False, is_misplaced=True)
                            continue
                        if len(running) >= self.rules.num_threads * _AHEAD:
                            running = not_done(running)
                        running.add(threads.submit(self._verify, bucket, checker, page, version))
                        step = int(page.key.hex()[:_DIGITS], 16)
                        on_progress(number * _STEPS + step, len(namespaces) * _STEPS)
                except TierError as error:
                    self.counts.bad(bucket.url_of(namespace), Condition.UNREADABLE, str(error))
            while running:
                running = not_done(running)
        self.counts.found.seconds += time.monotonic() - started_s

    def _version(self, bucket: StoredBucket, namespace: str) -> int | None:
        """Of the namespace's pages, if its manifest can be read. What is wrong with that counts."""
        found = bucket.manifest(namespace)
        self.counts.manifest(bucket.url_of(f"{namespace}/{MANIFEST}"), found)
        return found.manifest.page_format_version if found.manifest is not None else None

    def _verify(
        self, bucket: StoredBucket, checker: ObjectChecker, page: FoundPage, version: int | None
    ) -> None:
        fingerprint, key_id = fingerprint_in(page.namespace), key_id_in(page.namespace)
        expected = ExpectedPage(page.key, fingerprint, key_id, version)
        self.pace.wait(page.size_bytes)
        found = checker.check(page.name, page.size_bytes, expected)
        condition, done = found.of_page.condition, ""
        if condition not in (Condition.DAMAGED, Condition.UNREADABLE):
            self.counts.fine(condition, page.size_bytes)
            return
        if condition is Condition.DAMAGED and self.rules.quarantine:
            done = bucket.move_aside(page, found.tag)
        where = bucket.url_of(page.name, below_prefix=False)
        self.counts.bad(where, condition, found.of_page.why, done)
