"""Real node caches over a store with a limit: it is kept, what is used stays, one of them at a time
reclaims, and storage that hangs or fails under reclaim costs nobody else anything."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.fuse import FuseMount, mount_fuse, needs_fuse
from tests.store.node.support import (
    Engine,
    Place,
    alive,
    engine,
    kill,
    log_of,
    make_keys,
    wait_until,
)
from ucm.config.settings import StoreSettings
from ucm.store.blocks.keys import Key, salt_tag
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.reclaim_record import mark_of
from ucm.store.tiers.posix.reclaim_record_files import reclaims_on_record

pytestmark = [pytest.mark.process, pytest.mark.alone]

FILE = 64 << 10
GIB = 1 << 30
LIMIT = 128 * FILE
HOT = make_keys("hot", 5)


def limited(place: Place, socket: str = "a", **changes: Any) -> StoreSettings:
    fields: dict[str, Any] = {
        "capacity_gb": LIMIT / GIB,
        "gc_grace_s": 0.5,
        "gc_check_interval_s": 0.5,
        "gc_heartbeat_s": 0.2,
        "gc_stale_s": 2.0,
        "write_queue_pages": 64,
        "retry_ms": 50,
    }
    return place.settings(socket, **(fields | changes))


def files_bytes(place: Place) -> int:
    return len(place.blocks_at_once()) * FILE


def counter(client: Engine, name: str) -> int:
    return client.status().counters.get(name, 0)


def dump_all(client: Engine, name: str, num_prompts: int) -> Iterator[int]:
    """Prompts of five blocks each, one after the other."""
    for number in range(num_prompts):
        client.dump(make_keys(f"{name} {number}", 5))
        client.wait_written()
        yield number


def test_five_times_the_limit_goes_through_and_what_is_used_is_always_there(place: Place) -> None:
    """Memory keeps no page, so hits come from files."""
    settings = limited(place, pipeline=("Posix",))
    with engine(settings) as client:
        client.dump(HOT)
        client.wait_written()
        from_files = 0
        for _ in dump_all(client, "cold", 10_000):
            hits, of_files = client.load(HOT)
            assert hits == len(HOT)
            from_files += of_files
            assert files_bytes(place) <= LIMIT + 64 * FILE // 8
            if counter(client, "reclaimed_files_capacity") > 5 * LIMIT // FILE:
                break
        assert from_files > 100
        assert counter(client, "touched") > 0
        assert counter(client, "reclaimed_files_capacity") > 5 * LIMIT // FILE
        assert counter(client, "stored_limit_bytes") == LIMIT
        assert files_bytes(place) > LIMIT // 3


def test_what_is_reclaimed_stays_in_memory_and_is_written_again_when_it_is_used(
    place: Place,
) -> None:
    with engine(limited(place, cache_capacity_bytes=256 << 20)) as client:
        client.dump(HOT)
        client.wait_written()
        for _ in dump_all(client, "cold", 10_000):
            if not place.block(HOT[0]).exists():
                break
        assert not place.block(HOT[0]).exists(), "nobody has used it, so it went"

        assert client.load(HOT) == (5, 0), "from memory"
        wait_until(lambda: client.load(HOT) == (5, 0) and place.block(HOT[0]).exists(), "written")


def lease(place: Place) -> int | None:
    """The process that holds it."""
    try:
        return int(json.loads((place.store / paths.RECLAIM_LEASE).read_bytes())["pid"])
    except FileNotFoundError:
        return None


def test_one_node_at_a_time_reclaims_and_the_limit_is_that_of_all(place: Place) -> None:
    with engine(limited(place)) as one, engine(limited(place, "b"), "engine/1") as two:
        assert one.pid != two.pid
        for _ in zip(dump_all(one, "a", 10_000), dump_all(two, "b", 10_000), strict=True):
            assert files_bytes(place) <= LIMIT + 2 * 64 * FILE // 8
            both = (one, two)
            assert sum(counter(each, "reclaim_leases") for each in both) <= 1
            if any(counter(each, "reclaimed_files_capacity") for each in both):
                break
        wait_until(lambda: counter(one, "reclaim_leases") + counter(two, "reclaim_leases"), "one")
        holder, other = (one, two) if lease(place) == one.pid else (two, one)
        assert counter(holder, "reclaimed_files_capacity") > 0
        assert counter(other, "reclaimed_files_capacity") == 0


def test_one_that_is_killed_is_followed_by_the_other(place: Place) -> None:
    with engine(limited(place)) as one, engine(limited(place, "b"), "engine/1") as two:
        one.dump(make_keys("first", 5))
        two.dump(make_keys("second", 5))
        by_pid = {one.pid: one, two.pid: two}
        holder = wait_until(lambda: lease(place), "somebody has the lease")
        (other,) = (client for pid, client in by_pid.items() if pid != holder)
        kill(holder)

        wait_until(lambda: lease(place) == other.pid, "the other one has it")
        for _ in dump_all(other, "more", 10_000):
            assert files_bytes(place) <= LIMIT + 2 * 64 * FILE // 8
            if counter(other, "reclaimed_files_capacity") > 0:
                break
        assert counter(other, "reclaimed_files_capacity") > 0


@pytest.mark.long
def test_what_went_is_on_record_also_when_another_one_has_taken_over(place: Place) -> None:
    with engine(limited(place)) as one, engine(limited(place, "b"), "engine/1") as two:
        by_pid = {one.pid: one, two.pid: two}
        for name in ("first", "second"):
            holder = wait_until(lambda: lease(place) in by_pid and lease(place), "one reclaims")
            seen: set[Key] = set()
            gone: set[int] = set()
            for number in dump_all(by_pid[holder], name, 10_000):
                there = {key for key in make_keys(f"{name} {number}", 5) if is_there(place, key)}
                gone = {mark_of(key, b"") for key in seen if not is_there(place, key)}
                if gone:
                    break
                seen |= there
            wait_until(lambda gone=gone: gone == on_record(place, gone), f"what went of the {name}")
            kill(holder)
            del by_pid[holder]


def is_there(place: Place, key: Key) -> bool:
    return place.block(key).exists()


def on_record(place: Place, marks: set[int]) -> set[int]:
    return set(reclaims_on_record(str(place.store), marks).times_ns)


def test_a_node_that_idles_leaves_the_others_what_they_need(place: Place) -> None:
    """Though it was there first, and was granted all that it could have."""
    with engine(limited(place)) as idle:
        idle.dump(make_keys("first", 5))
        idle.wait_written()
        time.sleep(1.0)
        with engine(limited(place, "b"), "engine/1") as busy:
            for _ in dump_all(busy, "more", 10_000):
                assert files_bytes(place) <= LIMIT + 2 * 64 * FILE // 8
                if sum(counter(each, "reclaimed_files_capacity") for each in (idle, busy)):
                    break
            # Reclaim begins at seven tenths, so the busy one got as far.
            assert files_bytes(place) > LIMIT // 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_deleted_for_what_a_node_that_is_gone_might_have_written(
    place: Place, how: signal.Signals
) -> None:
    with engine(limited(place)) as one, engine(limited(place, "b"), "engine/1") as two:
        one.dump(HOT)
        one.wait_written()
        two.dump(make_keys("other", 5))
        two.wait_written()
        time.sleep(1.0)
        holder = wait_until(lambda: lease(place), "somebody has the lease")
        (other,) = (client for client in (one, two) if client.pid != holder)
        os.kill(holder, how)

        wait_until(lambda: lease(place) == other.pid, "the other one has it")
        wait_until(lambda: counter(other, "stored_bytes") == 10 * FILE, "it has counted")
        # It misses the other one from some time on.
        time.sleep(3.0)
        assert counter(other, "stored_bytes") == 10 * FILE
        assert counter(other, "reclaimed_files_capacity") == 0
        assert len(place.blocks()) == 10


def test_a_namespace_keeps_to_its_quota(place: Place) -> None:
    settings = limited(place, capacity_gb=0, quota_gb={"*": LIMIT / GIB})
    with engine(settings) as client:
        for _ in dump_all(client, "cold", 1000):
            assert files_bytes(place) <= LIMIT + 64 * FILE // 8
            if counter(client, "reclaimed_files_quota") > LIMIT // FILE:
                break
        assert counter(client, "reclaimed_files_quota") > LIMIT // FILE
        assert counter(client, "reclaimed_files_capacity") == 0


def test_a_salt_keeps_to_its_quota_and_the_rest_of_its_namespace_is_left_alone(
    place: Place,
) -> None:
    """Real keys, through the settings of a node cache, written again and again."""
    tag = salt_tag("tenant")
    quota = {"salt:tenant": LIMIT / GIB}
    others = make_keys("no salt", 5)
    with engine(limited(place, capacity_gb=0, quota_gb=quota)) as client:
        client.dump(others)
        for number in range(10_000):
            client.dump([Key(key[:-8] + tag) for key in make_keys(f"{number}", 5)])
            client.wait_written()
            salted = sum(tag.hex() in path.name for path in place.blocks_at_once())
            assert salted * FILE <= LIMIT
            if counter(client, "reclaimed_files_quota") > LIMIT // FILE:
                break
        assert counter(client, "reclaimed_files_quota") > LIMIT // FILE
        assert all(place.block(key).exists() for key in others)
        assert salted * FILE > LIMIT // 3


@pytest.fixture
def mount(place: Place) -> Iterator[FuseMount]:
    with mount_fuse(place.directory / "below", place.store) as mounted:
        yield mounted


def fill(client: Engine, place: Place, prefix: str) -> None:
    """Until reclaim has something to do. Looks at the files beside the mount."""
    below = place.directory / "below"
    for _ in dump_all(client, prefix, 1000):
        num_files = len(list(below.rglob("*.kv")))
        assert num_files <= LIMIT // FILE + 8
        if num_files > LIMIT // FILE * 0.7:
            return
    raise AssertionError("it never fills up")


@needs_fuse
def test_reclaim_that_hangs_in_storage_holds_up_nobody_and_no_end(
    place: Place, mount: FuseMount
) -> None:
    settings = limited(place, gc_grace_s=3.0)
    with engine(settings) as client:
        client.dump(HOT)
        client.wait_written()
        fill(client, place, "cold")
        before = mount.calls["unlink"]
        mount.hang("unlink")
        wait_until(lambda: mount.calls["unlink"] > before, "it hangs")
        for _ in range(20):
            assert client.load(HOT)[0] == 5
            assert client.status().invariant == ""
        os.kill(client.pid, signal.SIGTERM)
        wait_until(lambda: "leaves;" in log_of(settings), "it ends all the same")
        mount.release()


@needs_fuse
@pytest.mark.parametrize("operation", ["unlink", "readdir"])
def test_reclaim_that_fails_is_said_and_goes_on_once_storage_does(
    place: Place, mount: FuseMount, operation: str
) -> None:
    # With a grace period in which the store fills up.
    settings = limited(place, gc_grace_s=3.0)
    with engine(settings) as client:
        client.dump(HOT)
        client.wait_written()
        if operation == "unlink":
            mount.fail(operation, errno.EIO)
            fill(client, place, "cold")
        else:
            fill(client, place, "cold")
            mount.fail(operation, errno.EIO)
        wait_until(
            lambda: any(
                said in log_of(settings)
                for said in ("reclaim could not remove", "reclaim has to wait")
            ),
            "it is said",
        )
        assert client.load(HOT)[0] == 5
        mount.release()
        wait_until(lambda: counter(client, "reclaimed_files_capacity") > 0, "it goes on")


def test_a_node_cache_that_leaves_leaves_no_lease_behind(place: Place) -> None:
    settings = limited(place)
    with engine(settings) as client:
        client.dump(HOT)
        wait_until(lambda: lease(place) == client.pid, "it has the lease")
        os.kill(client.pid, signal.SIGTERM)
        wait_until(lambda: not alive(client.pid), "it has left")
    names = {path.name for path in Path(place.store).iterdir()}
    assert not [name for name in names if paths.is_reclaim_node(name)]
    assert paths.RECLAIM_LEASE not in names


def test_without_a_limit_nothing_of_reclaim_lies_in_a_store(place: Place) -> None:
    with engine(place.settings()) as client:
        client.dump(HOT)
        client.wait_written()
        time.sleep(0.2)
        assert not [path for path in place.store.iterdir() if "reclaim" in path.name]
