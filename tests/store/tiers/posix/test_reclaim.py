"""A store with a limit keeps to it, however fast it is written, and keeps what is used."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import pytest

from tests.faults.mounts import mount_tmpfs, own_mounts
from tests.store.tiers.posix.reclaim_parts import (
    MIB,
    Reclaiming,
    disk_bytes,
    limited_tier,
    patient,
    reclaiming,
    stored,
    until,
    until_full,
    write,
    write_many,
)
from tests.store.tiers.tier_contract import (
    content_of,
    dump,
    load,
    make_key,
    make_namespace,
    make_page,
)
from ucm.errors import TierError
from ucm.store.blocks.keys import Key, TailKey
from ucm.store.blocks.page_names import is_tail_name
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.reclaim_plan import WHOLE

NS = make_namespace("model", page_bytes=60 << 10)  # 64 KiB a file
OTHER = make_namespace("another", page_bytes=60 << 10)
FILE = 64 << 10
LIMIT = 8 * MIB


@pytest.fixture(autouse=True)
def _own_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ucm")


class Watch(threading.Thread):
    """Notes the most that a disk of the store's own had, as the disk says it."""

    def __init__(self, store: Path) -> None:
        super().__init__(daemon=True)
        self.store = store
        self.most_bytes = 0
        self.ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.ended.wait(0.001):
            disk = os.statvfs(self.store)
            self.most_bytes = max(self.most_bytes, (disk.f_blocks - disk.f_bfree) * disk.f_frsize)

    def most(self) -> int:
        self.ended.set()
        self.join()
        return self.most_bytes


@own_mounts
def test_a_writer_at_full_speed_never_exceeds_the_limit_and_what_is_used_is_always_there(
    tmp_path: Path,
) -> None:
    """Five times the limit goes through. The hot pages are touched as a node does it."""
    store = tmp_path / "store"
    mount_tmpfs(store, size_bytes=32 * MIB)
    rules = patient(grace_s=1.0)
    tier = limited_tier(store, limit_bytes=LIMIT, queue_pages=16, rules=rules)
    hot = [make_key(number) for number in range(10)]
    page = make_page(NS, "hot")
    for key in hot:
        dump(tier, NS, key, page)
    stop = threading.Event()
    missed: list[Key] = []

    def use() -> None:
        while not stop.wait(0.02):
            missed.extend(key for key in hot if load(tier, NS, key) != content_of(NS, page))
            tier.touch(NS, hot)

    user = threading.Thread(target=use, daemon=True)
    user.start()
    watch = Watch(store)
    with reclaiming(tier) as node:
        write_many(lambda number: write(tier, NS, number), 5 * LIMIT // FILE)
        stop.set()
        user.join()
        assert not missed
        assert node["reclaimed_files_capacity"] >= 3 * LIMIT // FILE
    # Its id, its manifest, and the notes of reclaim are a block each.
    assert LIMIT // 2 < watch.most() <= LIMIT + 8 * 4096


@own_mounts
def test_two_nodes_together_keep_to_the_limit_also_while_the_lease_changes_hands(
    tmp_path: Path,
) -> None:
    """What one has granted is still counted when the other one grants."""
    store = tmp_path / "store"
    mount_tmpfs(store, size_bytes=32 * MIB)
    tiers = [limited_tier(store, limit_bytes=LIMIT, queue_pages=4) for _ in range(2)]
    for tier in tiers:
        tier.open_namespace(NS)
    watch = Watch(store)
    nodes = [Reclaiming(tier) for tier in tiers]
    written = 0
    for number in range(400):
        written += write(tiers[0], NS, 2 * number) + write(tiers[1], NS, 2 * number + 1)
        if number % 100 == 99:
            holder = 0 if nodes[0]["reclaim_leases"] else 1
            nodes[holder].stop()
            nodes[holder] = Reclaiming(tiers[holder])
        time.sleep(0.005)
    for node in nodes:
        node.stop()
    assert written > LIMIT // FILE
    # Each may write four pages before anybody has counted.
    assert watch.most() <= LIMIT + 2 * 4 * FILE + 16 * 4096


def test_what_goes_is_what_was_used_longest_ago(tmp_path: Path) -> None:
    tier = limited_tier(tmp_path, limit_bytes=LIMIT)
    now_s = time.time()
    for number in range(100):
        write(tier_without_limit(tmp_path), NS, number)
        path = paths.block_path(str(tmp_path), NS.fingerprint, make_key(number))
        os.utime(path, (now_s, now_s - 1000 + number))
    tier.open_namespace(NS)
    with reclaiming(tier) as node:
        until(lambda: node["reclaimed_files_capacity"] >= 10, "it is reclaimed")
        left = {number for number in range(100) if load(tier, NS, make_key(number)) is not None}
        gone = [
            n
            for n in range(100)
            if f"{make_key(n).hex()}.kv" not in stored(tmp_path, NS.fingerprint)
        ]
    assert left
    assert gone == list(range(len(gone))), "the oldest, and no other"
    assert len(gone) <= 30


def tier_without_limit(store: Path):  # type: ignore[no-untyped-def]
    return limited_tier(store)


def test_tails_go_before_blocks(tmp_path: Path) -> None:
    writer = tier_without_limit(tmp_path)
    blocks = [make_key(number) for number in range(90)]
    tails = [Key(TailKey(make_key(f"tail {number}"), 5)) for number in range(10)]
    for key in [*blocks, *tails]:
        dump(writer, NS, key, make_page(NS, "a"))
    tier = limited_tier(tmp_path, limit_bytes=100 * FILE + MIB, rules=patient(trigger=0.85))
    tier.open_namespace(NS)
    with reclaiming(tier) as node:
        until(lambda: node["reclaimed_files_capacity"] >= 10, "it is reclaimed")
    assert not [name for name in stored(tmp_path, NS.fingerprint) if is_tail_name(name)]
    assert len(stored(tmp_path, NS.fingerprint)) >= 80


def test_what_is_young_stays_and_the_writer_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = limited_tier(tmp_path, limit_bytes=MIB, rules=patient(grace_s=3600))

    def room() -> bool:
        return len(stored(tmp_path, NS.fingerprint)) >= 14

    with reclaiming(tier):
        until(
            lambda: not write(tier, NS, len(stored(tmp_path, NS.fingerprint))) and room(),
            "it is full",
        )
        first = stored(tmp_path, NS.fingerprint)
        until(lambda: "reclaim has freed less than it should" in caplog.text, "it is said")
        assert not write(tier, NS, 999)
        assert stored(tmp_path, NS.fingerprint) == first
        assert disk_bytes(tmp_path) <= MIB + FILE


def test_a_full_store_says_which_setting_is_in_the_way(tmp_path: Path) -> None:
    tier = limited_tier(tmp_path, limit_bytes=MIB)
    (allowance,) = tier._allowances.values()
    for number in range(2):
        dump(tier, NS, make_key(number), make_page(NS, "a"))
    with pytest.raises(TierError, match="has to be counted first, for posix_capacity_gb"):
        dump(tier, NS, make_key(2), make_page(NS, "a"))

    allowance.grant({WHOLE: 2 * FILE + 8192})
    with pytest.raises(TierError, match=r"posix_capacity_gb leaves it 0\.00 GiB") as raised:
        dump(tier, NS, make_key(2), make_page(NS, "a"))

    assert raised.value.reason == "full"
    assert len(stored(tmp_path, NS.fingerprint)) == 2


def test_without_the_right_to_delete_a_node_keeps_to_the_limit_all_the_same(tmp_path: Path) -> None:
    tier = limited_tier(tmp_path, limit_bytes=MIB, rules=patient(deletes=False))
    with reclaiming(tier) as node:
        until_full(tier, NS, tmp_path, node)
        until(
            lambda: (
                len(stored(tmp_path, NS.fingerprint)) > 10
                or write(tier, NS, len(stored(tmp_path, NS.fingerprint)))
            ),
            "more",
        )
        time.sleep(1)
        assert node["reclaimed_files_capacity"] == 0
        assert disk_bytes(tmp_path) <= MIB + FILE


def test_temporary_files_count_and_strangers_are_never_deleted(tmp_path: Path) -> None:
    writer = tier_without_limit(tmp_path)
    for number in range(40):
        write(writer, NS, number)
    directory = Path(paths.block_path(str(tmp_path), NS.fingerprint, make_key(0))).parent
    strangers = [directory / name for name in ("notes.txt", ".nfs000123", "00.kv")]
    for path in strangers:
        path.write_bytes(bytes(MIB))
    (directory / f"{'0' * 64}.kv").symlink_to(strangers[0])
    tier = limited_tier(tmp_path, limit_bytes=4 * MIB)
    tier.open_namespace(NS)
    with reclaiming(tier) as node:
        until(lambda: node["reclaimed_files_capacity"] > 0, "it is reclaimed")
        assert node["stored_bytes"] >= 3 * MIB
    assert all(path.exists() for path in strangers)
    assert (directory / f"{'0' * 64}.kv").is_symlink()


@pytest.mark.parametrize("where", ["beside the pages", "in quarantine"])
def test_what_can_not_be_freed_empties_no_store_and_is_said_with_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """It is larger than the limit, so that nothing that is deleted would help."""
    tier = limited_tier(tmp_path, limit_bytes=LIMIT)
    with reclaiming(tier) as node:
        write_many(lambda number: write(tier, NS, number), 80)
        if where == "in quarantine":
            stranger = tmp_path / paths.QUARANTINE / NS.fingerprint.hex() / "damaged"
        else:
            page = Path(paths.block_path(str(tmp_path), NS.fingerprint, make_key(1000)))
            stranger = page.parent / "backup.tar"
        stranger.parent.mkdir(parents=True, exist_ok=True)
        stranger.write_bytes(bytes(2 * LIMIT))
        until(lambda: "files that reclaim can't free" in caplog.text, "it is said")
        assert "posix_capacity_gb leaves it: remove them" in caplog.text
        until(lambda: not write(tier, NS, 1), "the limit is reached")
        number = 2
        for _ in range(10):
            number += write(tier, NS, number)
            time.sleep(0.1)
        assert number == 2, "nothing is written"
        assert node["stored_other_bytes"] == 2 * LIMIT
        # A run may free a tenth below the trigger.
        assert len(stored(tmp_path, NS.fingerprint)) * FILE >= 0.9 * 0.7 * LIMIT / 4 - FILE

        stranger.unlink()
        until(lambda: write(tier, NS, number), "it goes on once that is gone")


def test_nothing_is_followed_out_of_the_store(tmp_path: Path) -> None:
    store, outside = tmp_path / "store", tmp_path / "outside"
    tier = limited_tier(store, limit_bytes=MIB)
    write(tier, NS, 1)
    outside.mkdir()
    key = make_key(2)
    (outside / key.hex()[2:4]).mkdir()
    victim = outside / key.hex()[2:4] / f"{key.hex()}.kv"
    victim.write_bytes(bytes(4 * MIB))
    (store / NS.fingerprint.hex() / key.hex()[:2]).symlink_to(outside)
    with reclaiming(tier) as node:
        write_many(lambda number: key_elsewhere(number, key) or write(tier, NS, number), 50)
        assert node["reclaimed_files_capacity"] > 0
    assert victim.exists()


def key_elsewhere(number: int, key: Key) -> bool:
    return make_key(number)[:1] == key[:1]


def test_a_store_that_was_emptied_by_hand_can_be_written_again(tmp_path: Path) -> None:
    tier = limited_tier(tmp_path, limit_bytes=MIB, rules=patient(grace_s=3600))
    with reclaiming(tier):
        until(lambda: not write(tier, NS, len(stored(tmp_path, NS.fingerprint))), "full")
        for path in (tmp_path / NS.fingerprint.hex()).rglob("*.kv"):
            path.unlink()
        until(lambda: write(tier, NS, 999), "it is counted anew")


def test_a_node_that_leaves_takes_its_files_with_it(tmp_path: Path) -> None:
    tier = limited_tier(tmp_path, limit_bytes=LIMIT)
    with reclaiming(tier) as node:
        write(tier, NS, 1)
        until(lambda: node["reclaim_leases"], "it has the lease")
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {paths.BACKEND_ID, paths.RECLAIM_GRANTS, NS.fingerprint.hex()}


def test_pages_that_went_are_told(tmp_path: Path) -> None:
    tier = limited_tier(tmp_path, limit_bytes=MIB)
    with reclaiming(tier) as node:
        write_many(lambda number: write(tier, NS, number), 60)
    there = {key for key in map(make_key, range(1000, 1060)) if tier.contains(NS, [key])}
    assert node.removed == {make_key(number) for number in range(1000, 1060)} - there
