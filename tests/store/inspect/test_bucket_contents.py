"""`bucket_contents.py` on objects in memory: strands by size, and what is told out of bounds."""

from __future__ import annotations

import time
from collections.abc import Iterator

from tests.cli.parts import manifest
from ucm.config.settings import StoreSettings
from ucm.store.blocks.blockfile import HEADER_BYTES
from ucm.store.blocks.namespace import fingerprint, to_json
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.inspect.bucket_contents import bucket_contents
from ucm.store.inspect.bucket_walk import Bounds, StoredBucket
from ucm.store.inspect.strand_pages import StrandPages
from ucm.store.tiers.s3.bucket import Got
from ucm.store.tiers.s3.listed_bucket import ListedObject

_SIZES = {"num_layers": 2, "num_kv_heads": 1, "k_size": 8, "v_size": 8, "item_bytes": 2}
WINDOWS = manifest(
    "gemma",
    format_version=2,
    strands=[{**_SIZES, "reach": "all"}, {**_SIZES, "num_layers": 10, "reach": "window 256"}],
)


class FewAtATime:
    """As a server lists them, two at a time."""

    def __init__(self) -> None:
        self.all: dict[str, int] = {}

    def put(self, number: int, size_bytes: int) -> None:
        key = f"{number:04x}".ljust(64, "a")
        self.all[f"{fingerprint(WINDOWS).hex()}/{key[:4]}/{key}.kv"] = size_bytes

    def listed(self, below: str, *, after: str = "") -> Iterator[list[ListedObject]]:
        start = f"{below}/" if below else ""
        names = sorted(name for name in self.all if name.startswith(start) and name > after)
        for i in range(0, len(names), 2):
            yield [ListedObject(each, self.all[each], time.time()) for each in names[i : i + 2]]

    def get_head(self, name: str, num_bytes: int) -> Got | None:
        content = to_json(WINDOWS)
        return Got(memoryview(content), len(content), "")


def bucket_of(objects: FewAtATime) -> StoredBucket:
    settings = StoreSettings(socket_path="", pipeline=("Cache", "S3"), s3_bucket="pages")
    bucket = StoredBucket(settings)
    bucket.objects = objects  # type: ignore[assignment]
    return bucket


def test_pages_of_unlike_strands_are_told_apart_by_their_size() -> None:
    objects = FewAtATime()
    of_all, of_window = (HEADER_BYTES + padded_bytes(n) for n in StrandPages(WINDOWS).page_bytes)
    assert of_all != of_window
    for number, size_bytes in enumerate((of_all, of_all, of_window, 17)):
        objects.put(number, size_bytes)

    (found,) = bucket_contents(bucket_of(objects), Bounds()).namespaces

    assert found.sizes is not None and found.num_pages == 4
    assert [(use.strand, use.num_pages, use.allocated_bytes) for use in found.sizes.by_strand] == [
        ("", 1, 17),
        ("all", 2, 2 * of_all),
        ("window 256", 1, of_window),
    ]


def test_out_of_bounds_what_was_counted_is_told() -> None:
    objects = FewAtATime()
    for number in range(40):
        objects.put(number, 100)

    (found,) = bucket_contents(bucket_of(objects), Bounds(max_requests=8)).namespaces

    assert 0 < found.num_pages < 40 and found.num_problems == 1
    assert found.problem.startswith("not all was seen: it ended after 8 requests")
    assert "--max" not in found.problem
