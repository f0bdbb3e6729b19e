"""Storage that hangs, is full, read-only, shared, or damaged, behind a real node cache."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.faults.fuse import FuseMount, mount_fuse, needs_fuse
from tests.faults.mounts import mount_read_only, mount_tmpfs, own_mounts
from tests.store.node.support import Engine, Place, engine, make_keys, wait_until
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p

pytestmark = pytest.mark.process
KEYS = make_keys("a", 5)
OTHERS = make_keys("b", 5)


class HungFile:
    """The file of a block, whose readers sleep until the mount's `release`."""

    def __init__(self, mount: FuseMount, place: Place, key: Key) -> None:
        self._block = mount.source / place.block(key).relative_to(place.store)
        self._good = self._block.read_bytes()
        mount.hang("read", file=self._block)

    def repair(self) -> None:
        """As another node does: a good file under the name. Whoever hangs goes on hanging."""
        repaired = self._block.with_name("repaired")
        repaired.write_bytes(self._good)
        repaired.rename(self._block)


@pytest.fixture
def mount(place: Place) -> Iterator[FuseMount]:
    """Over the whole store."""
    with mount_fuse(place.directory / "below", place.store) as mounted:
        yield mounted


def has_ended(pid: int) -> bool:
    """All of the process that can end: a thread in a call that the mount has begun to answer stays
    in the kernel until the mount goes on, after SIGKILL as well."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def slots_of(client: Engine, *states: str) -> tuple[int, ...]:
    slots = client.status().slots
    return tuple(slots[state] for state in states)


@needs_fuse
def test_a_lookup_is_settled_at_its_deadline_when_a_read_hangs(
    place: Place, mount: FuseMount
) -> None:
    place.write([*KEYS, *OTHERS])
    HungFile(mount, place, KEYS[2])
    with engine(place.settings(io_timeout_ms=60_000)) as client:
        reply = client.look_up(KEYS, timeout_ms=2000)

        assert (len(reply.offsets), reply.reason) == (2, "timeout")
        assert client.load(OTHERS) == (5, 5)
        assert slots_of(client, "filling", "aside") == (1, 0)
        mount.release()
        wait_until(lambda: slots_of(client, "filling", "aside") == (0, 0), "the read has returned")


@needs_fuse
def test_the_slot_of_an_overdue_read_is_set_aside_until_the_read_returns(
    place: Place, mount: FuseMount
) -> None:
    """Late bytes may land in it; the block itself can be had again at once, in another slot."""
    place.write(KEYS)
    hung = HungFile(mount, place, KEYS[2])
    with engine(place.settings(io_timeout_ms=2000)) as client:
        reply = client.look_up(KEYS, timeout_ms=10_000)
        assert (len(reply.offsets), reply.reason) == (2, "timeout")
        assert slots_of(client, "filling", "aside") == (0, 1)
        assert client.status().queues["reads_overdue"] == 1
        hung.repair()

        assert client.load(KEYS)[0] == 5

        assert slots_of(client, "aside") == (1,)
        mount.release()
        wait_until(lambda: slots_of(client, "aside") == (0,), "the slot has come back")
        status = client.wait_written()
        assert status.counters["read_overdue"] == 1
        assert status.invariant == ""
        assert client.load(KEYS)[0] == 5


@needs_fuse
def test_with_half_of_the_threads_hung_memory_still_hits_and_files_are_misses(
    place: Place, mount: FuseMount
) -> None:
    place.write([*KEYS, *OTHERS])
    for key in KEYS[:2]:
        HungFile(mount, place, key)
    with engine(place.settings(io_timeout_ms=1000, read_threads=4)) as client:
        client.dump(make_keys("resident", 3))
        for i in range(2):
            assert client.look_up(KEYS[i:]).reason == "timeout"

        reply = client.look_up(OTHERS, timeout_ms=60_000)
        assert (reply.offsets, reply.reason) == ([], "timeout")
        assert client.load(make_keys("resident", 3)) == (3, 0)

        mount.release()
        wait_until(lambda: not client.status().queues["reads_overdue"], "storage is back")
        assert client.load(OTHERS) == (5, 5)


@needs_fuse
def test_a_node_cache_leaves_in_spite_of_a_hung_read(place: Place, mount: FuseMount) -> None:
    place.write(KEYS)
    with engine(place.settings(idle_exit_s=0.3)) as client:
        mount.freeze()
        client.ask(KEYS)
        wait_until(lambda: client.status().queues["reads"], "the read hangs")
        client.client.send(p.Shutdown())

        wait_until(lambda: has_ended(client.pid), "it has left")


@needs_fuse
@pytest.mark.parametrize("how", ["told", "by a signal"])
def test_a_node_cache_leaves_though_everything_that_it_does_in_storage_hangs(
    place: Place, mount: FuseMount, how: str
) -> None:
    """Reads, writes, questions, who sweeps and who reclaims."""
    place.write(KEYS)
    limits = {"capacity_gb": 1.0, "gc_check_interval_s": 0.1, "gc_heartbeat_s": 0.1}
    with engine(place.settings(drain_s=0.5, **limits)) as client:
        wait_until(lambda: client.status().counters["reclaim_leases"] == 1, "it reclaims")
        for operation in ("lookup", "getattr", "open", "read", "write", "create", "readdir"):
            mount.hang(operation)
        client.ask(KEYS)
        client.dump(OTHERS)
        wait_until(lambda: client.status().queues["writes"], "a write hangs")
        if how == "told":
            client.client.send(p.Shutdown())
        else:
            os.kill(client.pid, signal.SIGTERM)

        wait_until(lambda: has_ended(client.pid), "it has left")
        mount.release()


@own_mounts
def test_on_a_full_disk_nothing_is_published_after_what_did_not_fit(place: Place) -> None:
    mount_tmpfs(place.store, size_bytes=1 << 20)
    keys = make_keys("long", 60)
    with engine(place.settings()) as client:
        client.dump(KEYS)
        client.wait_written()
        client.dump(keys)
        counters = client.wait_written().counters

        num_written = len(place.blocks()) - len(KEYS)
        assert num_written <= 16 - len(KEYS)
        assert place.blocks() == {place.block(key) for key in [*KEYS, *keys[:num_written]]}
        assert place.stray_files() == []
        assert counters["write_failed_full"] >= 1
        assert num_written + dropped(counters) == len(keys)
        assert client.load(keys) == (len(keys), 0)

        for path in place.blocks():
            path.unlink()
        client.dump(OTHERS)
        client.wait_written()
        assert place.blocks() == {place.block(key) for key in OTHERS}


def dropped(counters: dict[str, int]) -> int:
    """Pages that were committed and did not get to storage."""
    reasons = ("write_failed_full", "write_failed_io_error", "dump_dropped_after_failed")
    return sum(counters.get(reason, 0) for reason in reasons)


@own_mounts
def test_a_read_only_mount_can_be_read_from_and_takes_no_dumps(place: Place) -> None:
    place.write(KEYS)
    mounted = place.directory / "mounted"
    mount_read_only(place.store, mounted)
    with Engine(place.settings(storage_backends=(str(mounted),))) as client:
        assert not client.open_namespace().refused

        assert client.load(KEYS) == (5, 5)
        client.dump(OTHERS)
        counters = client.wait_written().counters
        assert counters["write_failed_io_error"] >= 1
        assert dropped(counters) == len(OTHERS)
        assert client.load(OTHERS) == (5, 0)
    assert place.blocks() == {place.block(key) for key in KEYS}


def test_what_one_node_dumps_another_node_loads_from_files(place: Place) -> None:
    with engine(place.settings("a")) as here, engine(place.settings("b")) as there:
        assert there.load(KEYS) == (0, 0)
        here.dump(KEYS)
        here.wait_written()

        assert there.load(KEYS) == (5, 5)
        assert there.load(KEYS) == (5, 0)


def test_a_file_with_a_flipped_bit_is_absent_and_moved_to_quarantine_once(place: Place) -> None:
    """Also when two nodes and four engines come upon it at the same time."""
    place.write(KEYS)
    damaged = place.block_with_flipped_bit(KEYS[2])
    settings = [place.settings("a"), place.settings("b")]
    names = [(each, f"engine{i}/0") for each in settings for i in range(2)]
    engines = [engine(each, name) for each, name in names]
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(lambda client: client.load(KEYS)[0], engines))

    assert found == [2, 2, 2, 2]
    (aside,) = place.in_quarantine()
    assert aside.read_bytes() == damaged
    assert not place.block(KEYS[2]).exists()

    first, *_, last = engines
    first.dump(KEYS)
    first.wait_written()
    assert last.load(KEYS)[0] == 5
    assert place.in_quarantine() == [aside]
    for each in engines:
        each.close()


@pytest.mark.parametrize("damage", ["truncated", "empty", "of another block"])
def test_a_damaged_file_is_a_miss_and_is_replaced_by_the_next_dump(
    place: Place, damage: str
) -> None:
    place.write(KEYS)
    block: Path = place.block(KEYS[1])
    good = block.read_bytes()
    others = {"truncated": good[:9999], "empty": b""}
    block.write_bytes(others.get(damage, place.block(KEYS[0]).read_bytes()))
    with engine(place.settings()) as client:
        assert client.load(KEYS)[0] == 1
        assert len(place.in_quarantine()) == 1
        assert client.status().counters["read_corrupt"] == 1

        client.dump(KEYS)
        client.wait_written()

    assert block.read_bytes() == good


def test_a_queue_that_is_full_drops_dumps_and_holds_up_no_engine(place: Place) -> None:
    settings = place.settings(write_queue_pages=4, write_threads=1)
    keys = make_keys("long", 300)
    with engine(settings) as client:
        offsets = client.dump(keys)
        counters = client.wait_written().counters

        written = place.blocks()
        assert written == {place.block(key) for key in keys[: len(written)]}
        assert 4 <= len(written) < len(keys)
        assert counters["dump_dropped_queue_full"] >= 1
        assert counters["write_done"] == len(written)
        assert client.load(keys)[0] == sum(offset >= 0 for offset in offsets)
