"""`bucket_reclaim.py` on objects in memory: what goes first, what stays, and how it is bounded."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from ucm.config.settings import StoreSettings
from ucm.store.inspect.bucket_reclaim import BucketOrder, ReclaimedBucket, reclaim_bucket
from ucm.store.inspect.bucket_walk import Bounds, StoredBucket
from ucm.store.tiers.s3.listed_bucket import ListedObject

PREFIX = "some/where"
NAMESPACES = ("1" * 64, "2" * 64 + "-" + "3" * 16)
HOUR_S = 3600.0
SIZE = 100


class Objects:
    """As a server lists them, three at a time."""

    def __init__(self) -> None:
        self.all: dict[str, ListedObject] = {}
        self.num_listed = 0

    def put(self, name: str, age_s: float) -> str:
        self.all[name] = ListedObject(name, SIZE, time.time() - age_s)
        return name

    def listed(self, below: str, *, after: str = "") -> Iterator[list[ListedObject]]:
        start = f"{below}/" if below else ""
        names = sorted(name for name in self.all if name.startswith(start) and name > after)
        found = [self.all[name] for name in names]
        for i in range(0, len(found), 3):
            self.num_listed += 1
            yield found[i : i + 3]

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            del self.all[name]


@pytest.fixture
def objects() -> Objects:
    return Objects()


def page(number: int, namespace: str = NAMESPACES[0], tail: str = "") -> str:
    key = f"{number:04x}".ljust(64, "a")
    return f"{PREFIX}/{namespace}/{key[:4]}/{key}{tail}.kv"


def reclaimed(objects: Objects, bounds: Bounds | None = None, **order: Any) -> ReclaimedBucket:
    settings = StoreSettings(
        socket_path="", pipeline=("Cache", "S3"), s3_bucket="pages", s3_prefix=PREFIX
    )
    bucket = StoredBucket(settings)
    bucket.objects = objects  # type: ignore[assignment]
    return reclaim_bucket(bucket, BucketOrder(**order), bounds or Bounds())


def test_what_was_written_longest_ago_goes_first_in_any_namespace(objects: Objects) -> None:
    old = [objects.put(page(i, NAMESPACES[i % 2]), (20 + i) * HOUR_S) for i in range(7)]
    new = [objects.put(page(i + 100, NAMESPACES[i % 2]), (1 + i) * HOUR_S) for i in range(8)]

    found = reclaimed(objects, free_bytes=7 * SIZE)

    assert (found.num_pages, found.freed_bytes, found.is_enough) == (7, 7 * SIZE, True)
    assert sorted(objects.all) == sorted(new) and not set(old) & objects.all.keys()


def test_tails_go_before_pages_as_only_a_hand_off_has_used_them(objects: Objects) -> None:
    objects.put(page(1, tail=".12"), HOUR_S)
    kept = objects.put(page(2), 50 * HOUR_S)

    assert reclaimed(objects, free_bytes=1).num_pages == 1
    assert [*objects.all] == [kept]


def test_as_much_goes_as_leaves_what_may_stay(objects: Objects) -> None:
    for i in range(10):
        objects.put(page(i), (10 + i) * HOUR_S)

    assert reclaimed(objects, keep_bytes=4 * SIZE).num_pages == 6
    assert sorted(objects.all) == [page(i) for i in range(4)]
    assert reclaimed(objects, keep_bytes=4 * SIZE).num_pages == 0


def test_of_one_minute_no_more_goes_than_has_to(objects: Objects) -> None:
    for i in range(10):
        objects.put(page(i), HOUR_S)

    assert reclaimed(objects, free_bytes=3 * SIZE - 1).num_pages == 3
    assert len(objects.all) == 7


def test_what_is_older_goes_all_and_nothing_else(objects: Objects) -> None:
    objects.put(page(1), 49 * HOUR_S)
    young = objects.put(page(2), 47 * HOUR_S)

    assert reclaimed(objects, older_than_s=48 * HOUR_S).is_enough
    assert [*objects.all] == [young]


def test_what_is_young_stays_and_is_counted(objects: Objects) -> None:
    objects.put(page(1), 60.0)

    found = reclaimed(objects, free_bytes=1, grace_s=120.0)
    assert (found.num_pages, found.num_young, found.is_enough) == (0, 1, False)


def test_manifests_and_what_no_tier_has_named_are_never_touched(objects: Objects) -> None:
    key = "b" * 64
    names = [
        f"{PREFIX}/{NAMESPACES[0]}/manifest.json",
        f"{PREFIX}/{NAMESPACES[0]}/abcd/{key}.kv",
        f"{PREFIX}/{NAMESPACES[0]}/{key[:4]}/{key}.kv.old",
        f"{PREFIX}/elsewhere/{key[:4]}/{key}.kv",
        f"{PREFIX}/notes.txt",
        f"{PREFIX}/quarantine/notes.txt",
        f"some/other/{NAMESPACES[0]}/{key[:4]}/{key}.kv",
    ]
    for name in names:
        objects.put(name, 1000 * HOUR_S)
    objects.put(page(1), 1000 * HOUR_S)

    assert reclaimed(objects, free_bytes=1 << 40, quarantine_s=HOUR_S).num_pages == 1
    assert sorted(objects.all) == sorted(names)


def test_quarantine_goes_after_an_age_of_its_own(objects: Objects) -> None:
    aside = f"{PREFIX}/quarantine/{NAMESPACES[0]}/{'c' * 64}.kv."
    old, young = objects.put(aside + "0" * 16, 200 * HOUR_S), aside + "1" * 16
    objects.put(young, 100 * HOUR_S)

    assert reclaimed(objects, free_bytes=0, quarantine_s=0.0).num_aside == 0
    assert old in objects.all
    assert reclaimed(objects, free_bytes=0, quarantine_s=168 * HOUR_S).num_aside == 1
    assert [*objects.all] == [young]


def test_a_dry_run_tells_what_the_real_one_then_deletes(objects: Objects) -> None:
    for i in range(10):
        objects.put(page(i), (10 + i) * HOUR_S)

    told = reclaimed(objects, free_bytes=5 * SIZE, is_dry=True)
    assert len(objects.all) == 10
    done = reclaimed(objects, free_bytes=5 * SIZE)
    assert (told.num_pages, told.freed_bytes) == (done.num_pages, done.freed_bytes) == (5, 500)


def test_it_ends_at_its_bounds_and_says_so_and_what_it_has_freed_by_then_is_gone(
    objects: Objects,
) -> None:
    """To count is one listing, to delete another one: what ends in the second has freed some."""
    for i in range(30):
        objects.put(page(i), (10 + i) * HOUR_S)

    found = reclaimed(objects, Bounds(8, are_options=True), free_bytes=30 * SIZE)
    assert "--max-requests 8" in found.problem and not found.is_enough
    assert found.num_pages == 0 and len(objects.all) == 30

    found = reclaimed(objects, Bounds(18, are_options=True), free_bytes=30 * SIZE)
    assert "--max-requests 18" in found.problem
    assert 0 < found.num_pages == 30 - len(objects.all)
    assert found.num_requests <= 19 and objects.num_listed <= 26


def test_it_ends_in_time(objects: Objects) -> None:
    for i in range(30):
        objects.put(page(i), (10 + i) * HOUR_S)
    bounds = Bounds(max_s=5.0, are_options=True)
    original = objects.listed

    def slowly(below: str, *, after: str = "") -> Iterator[list[ListedObject]]:
        for answer in original(below, after=after):
            bounds.started_s -= 2.0
            yield answer

    objects.listed = slowly  # type: ignore[method-assign]
    assert "--max-s 5" in reclaimed(objects, bounds, free_bytes=SIZE).problem
    assert len(objects.all) == 30


def test_folders_of_others_cost_one_request_each(objects: Objects) -> None:
    for i in range(300):
        objects.put(f"{PREFIX}/0elsewhere/{i}", HOUR_S)
    objects.put(page(1), HOUR_S)

    assert reclaimed(objects, Bounds(max_requests=8), free_bytes=SIZE).num_pages == 1
