"""`bucket_probe.py` on objects in memory that take their time: how long all of it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import msgspec
import pytest

from ucm.config.settings import StoreSettings
from ucm.store.inspect.bucket_probe import BucketProbe
from ucm.store.inspect.bucket_walk import StoredBucket
from ucm.store.inspect.verdicts import Wishes
from ucm.store.inspect.within import Trial
from ucm.store.tiers.s3.bucket import Got
from ucm.store.tiers.s3.listed_bucket import ListedObject

_SETTINGS = StoreSettings(socket_path="", pipeline=("Cache", "S3"), s3_bucket="pages")
_WISHES = Wishes(
    min_free_bytes=None,
    queue_pages=0,
    is_sealed=False,
    lookup_timeout_s=30.0,
    handoff_timeout_s=30.0,
    block_tokens=16,
    prefill_tokens_per_s=0.0,
    read_threads=8,
)


class SlowObjects:
    """Each request takes `each_s`; `of_a_page_s` for a page."""

    def __init__(self, each_s: float, of_a_page_s: float) -> None:
        self._each_s, self._of_a_page_s = each_s, of_a_page_s
        self.all: dict[str, bytes] = {}
        self.num_pages_put = 0

    def put(self, name: str, parts: Sequence[bytes]) -> None:
        content = b"".join(parts)
        self.num_pages_put += len(content) == 4096
        time.sleep(self._of_a_page_s if len(content) == 4096 else self._each_s)
        self.all[name] = content

    def put_if_allowed(self, name: str, content: bytes) -> bool:
        self.put(name, [content])
        return True

    def get(self, name: str, *, most_bytes: int) -> Got | None:
        content = self.all.get(name)
        is_page = content is not None and len(content) == 4096
        time.sleep(self._of_a_page_s if is_page else self._each_s)
        return None if content is None else Got(memoryview(content), len(content), "")

    def tag(self, name: str) -> str | None:
        time.sleep(self._each_s)
        return "" if name in self.all else None

    def look(self, name: str) -> ListedObject | None:
        time.sleep(self._each_s)
        return ListedObject(name, 1, time.time()) if name in self.all else None

    def move(self, name: str, to: str) -> None:
        time.sleep(2 * self._each_s)
        self.all[to] = self.all.pop(name)

    def delete(self, names: Sequence[str]) -> None:
        time.sleep(self._each_s)
        for name in names:
            self.all.pop(name, None)

    def listed(self, below: str, *, after: str = "") -> Iterator[list[ListedObject]]:
        time.sleep(self._each_s)
        yield [ListedObject(name, 1, 0.0) for name in sorted(self.all) if name > after]


@pytest.mark.parametrize(
    ("each_s", "of_a_page_s", "most_at_once"), [(0.12, 0.1, 8), (0.02, 0.5, 1)]
)
def test_a_server_that_is_far_is_tried_out_within_two_seconds_and_left_as_it_was(
    each_s: float, of_a_page_s: float, most_at_once: int
) -> None:
    """One request after the other, and eight pages at once, it would be more."""
    bucket = StoredBucket(_SETTINGS)
    objects = bucket.objects = SlowObjects(each_s, of_a_page_s)  # type: ignore[assignment]

    began_s = time.monotonic()
    found = BucketProbe(bucket, 4096, _WISHES, Trial("")).run()
    took_s = time.monotonic() - began_s

    assert took_s < 2.0
    assert {each.check for each in found} >= {"endpoint", "latency", "put", "get", "delete"}
    assert [each.check for each in found if each.verdict != "fine"] == ["lifecycle"]
    assert objects.all == {} and objects.num_pages_put <= 1 + most_at_once


def test_lookups_are_late_where_all_threads_together_take_longer_than_an_engine_waits() -> None:
    for threads, is_late in ((8, False), (1, True)):
        bucket = StoredBucket(_SETTINGS)
        bucket.objects = SlowObjects(0.01, 0.0)  # type: ignore[assignment]
        wishes = msgspec.structs.replace(_WISHES, read_threads=threads, lookup_timeout_s=0.9)
        found = {each.check: each for each in BucketProbe(bucket, 4096, wishes, Trial("")).run()}
        assert (found["latency"].verdict == "warning") is is_late, found["latency"]
        assert f"of 128 blocks, {threads} at a time" in found["latency"].found
