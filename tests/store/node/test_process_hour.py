"""An hour of blocks at full speed through a store with a limit, in a minute or two: the limit is
kept by the disk's own word all the time, and hot prefixes are hits every time."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.mounts import mount_tmpfs, own_mounts
from tests.store.node.support import Engine, Place, engine, make_keys
from ucm.config.settings import StoreSettings
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.reclaim_plan import ReclaimRules

pytestmark = [
    pytest.mark.process,
    pytest.mark.alone,
    pytest.mark.long,
    pytest.mark.timeout(600),
]

GIB = 1 << 30
FILE = 64 << 10
DISK = 2 * GIB
LIMIT = GIB // 2
QUEUE_PAGES = 64
# 2,800 new tokens a second for an hour, in blocks of 128: ten times the limit.
BLOCKS = 80_000
PROMPT_BLOCKS = 16
HOT = [make_keys(f"hot {number}", PROMPT_BLOCKS) for number in range(4)]
# What lies in a store beside pages and is in nobody's limit: its id, a manifest, notes of each node
# and their temporary names, a block of the disk each; and what was reclaimed, 8 bytes for each.
BESIDE = 64 * 4096 + 2 * BLOCKS * 8


def least_bytes(num_nodes: int) -> int:
    """What is stored at least, once reclaim was about to begin.

    A run leaves `trigger * (1 - share)` of the limit of what is believed to be used. That is more
    than is used by what nodes write while the store is counted, which then counts twice: no more
    than they had been granted when the count began, as nothing is granted meanwhile, and what they
    were writing just then, a write queue each at most. Granted are parts of `spare_share`; but a
    node that was refused has written its part since the last run, and gets an equal part of all
    that is left (grants.py). Between counts the difference stays what it is.
    """
    rules = ReclaimRules()
    left_by_run = rules.trigger * (1 - rules.share)
    part = rules.spare_share / num_nodes
    most_open = max(
        (num_nodes - refused) * part + refused * (1 - left_by_run - refused * part) / num_nodes
        for refused in range(num_nodes + 1)
    )
    return int((left_by_run - most_open) * LIMIT) - num_nodes * QUEUE_PAGES * FILE


def settings(place: Place, socket: str) -> StoreSettings:
    """Times are a fortieth of the defaults, as an hour is one and a half minutes. Memory keeps no
    page, so hits come from files."""
    return place.settings(
        socket,
        pipeline=("Posix",),
        capacity_gb=LIMIT / GIB,
        gc_grace_s=3.0,
        gc_check_interval_s=0.75,
        gc_heartbeat_s=0.2,
        gc_stale_s=2.0,
        write_queue_pages=QUEUE_PAGES,
        retry_ms=50,
        cache_capacity_bytes=64 << 20,
    )


class Watch(threading.Thread):
    """The most and, once reclaim was about to begin, the least that the disk says is used of it."""

    def __init__(self, store: Path) -> None:
        super().__init__(daemon=True)
        self.store = store
        self.most_bytes = 0
        self.least_bytes = DISK
        self.num_looks = 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.002):
            disk = os.statvfs(self.store)
            used_bytes = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
            self.most_bytes = max(self.most_bytes, used_bytes)
            if self.most_bytes > 0.69 * LIMIT:
                self.least_bytes = min(self.least_bytes, used_bytes)
            self.num_looks += 1


@dataclass
class Writer:
    """One engine at full speed, which uses a hot prefix with every other prompt."""

    name: str
    client: Engine
    num_blocks: int
    num_loads: int = 0
    from_files: int = 0
    missed: list[int] = field(default_factory=list)

    def written(self) -> int:
        return self.client.status().counters["tier_write_pages"]

    def run(self) -> None:
        for number in range(20 * BLOCKS // PROMPT_BLOCKS):
            self.client.dump(make_keys(f"{self.name} {number}", PROMPT_BLOCKS))
            if number % 2:
                hits, from_files = self.client.load(HOT[number // 2 % len(HOT)])
                self.num_loads += 1
                self.from_files += from_files
                if hits != PROMPT_BLOCKS:
                    self.missed.append(number)
            if number % 20 == 0 and self.written() >= self.num_blocks:
                return
        raise AssertionError(f"{self.name}: only {self.written()} blocks were written")


def run_all(writers: Sequence[Writer]) -> None:
    failed: list[BaseException] = []

    def run(writer: Writer) -> None:
        try:
            writer.run()
        except BaseException as error:  # noqa: BLE001 (raised again below)
            failed.append(error)

    threads = [threading.Thread(target=run, args=[writer]) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def counters_of(client: Engine, name: str) -> int:
    return client.status().counters.get(name, 0)


@pytest.mark.parametrize("num_nodes", [1, 3])
def test_an_hour_at_full_speed_keeps_the_limit_and_hot_prefixes(
    place: Place, num_nodes: int
) -> None:
    """Each node may write a write queue's pages before anybody has counted."""
    own_mounts(lambda: _an_hour(place, num_nodes))()


def _an_hour(place: Place, num_nodes: int) -> None:
    mount_tmpfs(place.store, size_bytes=DISK)
    watch = Watch(place.store)
    with ExitStack() as stack:
        # A thread has the mounts of whoever starts it.
        watch.start()
        stack.callback(watch.ended.set)
        writers = [
            Writer(
                socket,
                stack.enter_context(engine(settings(place, socket), f"engine/{socket}")),
                BLOCKS // num_nodes,
            )
            for socket in "abc"[:num_nodes]
        ]
        for hot in HOT:
            writers[0].client.dump(hot)
        writers[0].client.wait_written()

        run_all(writers)

        assert [writer.missed for writer in writers] == [[]] * num_nodes
        assert all(writer.num_loads > 500 for writer in writers)
        assert sum(writer.from_files for writer in writers) > 500 * PROMPT_BLOCKS
        gone = sum(counters_of(each.client, "reclaimed_files_capacity") for each in writers)
        # Of a run that is at it nothing is told yet.
        assert gone >= BLOCKS - 2 * LIMIT // FILE
    assert watch.num_looks > 1000
    assert watch.most_bytes <= LIMIT + num_nodes * QUEUE_PAGES * FILE + BESIDE
    assert watch.least_bytes > least_bytes(num_nodes), "no more goes than has to"
    assert not list(place.store.glob(f"{paths.QUARANTINE}/*/*"))
