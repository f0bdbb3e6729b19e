"""How much is stored is counted, or estimated rather too high; and nobody writes more than it was
granted of what a limit leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.tiers.posix.reclaim_parts import MIB, limited_tier, write
from tests.store.tiers.tier_contract import make_key, make_namespace, make_page
from ucm.errors import TierError
from ucm.store.blocks.keys import Key, salt_tag
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.allowance import Allowance
from ucm.store.tiers.posix.grants import NodeAccount
from ucm.store.tiers.posix.quotas import quotas_of, salt_account
from ucm.store.tiers.posix.shard_walk import Leaf, ShardWalk
from ucm.store.tiers.posix.stored_count import StoredCount, UsedBook, count_stored

NS = make_namespace("model", page_bytes=60 << 10)  # 64 KiB a file
FILE = 64 << 10
KEY = make_key(1)


@pytest.mark.parametrize("num_files", [0, 1, 500])
def test_a_small_store_is_counted_exactly(tmp_path: Path, num_files: int) -> None:
    for number in range(num_files):
        write(limited_tier(tmp_path), NS, number)
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        count = count_stored(root, time.time_ns, lambda: None)
    finally:
        os.close(root)
    assert (count.error, count.num_files) == (0, num_files)
    assert count.nbytes[""] == num_files * FILE


def test_a_large_store_is_estimated_and_rather_too_high(tmp_path: Path) -> None:
    """From a part of it that has 1000 files: of 20 estimates hardly one is lower than the truth."""
    folder = tmp_path / ("0" * 64)
    num_files = 20_000
    for number in range(num_files):
        key = make_key(number).hex()
        leaf = folder / key[:2] / key[2:4]
        leaf.mkdir(parents=True, exist_ok=True)
        (leaf / f"{key}.kv").write_bytes(b"x" * 4096)
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        counts = [count_stored(root, time.time_ns, lambda: None, enough=1000) for _ in range(20)]
    finally:
        os.close(root)
    shares = sorted(count.nbytes[""] / (num_files * 4096) for count in counts)
    assert all(0.02 < count.error < 0.04 for count in counts)
    assert 0.9 < shares[0] and shares[2] > 0.98 and shares[-1] < 1.25


def test_what_is_no_page_is_told_apart_and_one_large_file_stands_for_no_others(
    tmp_path: Path,
) -> None:
    folder = tmp_path / ("0" * 64)
    for number in range(4000):
        key = make_key(number).hex()
        leaf = folder / key[:2] / key[2:4]
        leaf.mkdir(parents=True, exist_ok=True)
        (leaf / f"{key}.kv").write_bytes(b"x" * 4096)
        with (leaf / "backup.tar").open("wb") as file:  # of 100 MiB, and no blocks yet
            file.truncate(100 * MIB)
    num_large = len(list(folder.rglob("backup.tar")))
    quarantine = tmp_path / paths.QUARANTINE / ("0" * 64)
    quarantine.mkdir(parents=True)
    (quarantine / "damaged").write_bytes(b"x" * 8192)
    (leaf / f".{key}.kv.tmp").write_bytes(b"x" * 4096)
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        whole = count_stored(root, time.time_ns, lambda: None)
        some = [count_stored(root, time.time_ns, lambda: None, enough=400) for _ in range(5)]
    finally:
        os.close(root)

    assert whole.other_bytes[""] == num_large * 100 * MIB + 8192 + 4096
    assert whole.nbytes[""] == whole.other_bytes[""] + 4000 * 4096
    assert whole.nbytes["0" * 64] == whole.nbytes[""] - 8192
    assert all(count.other_bytes[""] < whole.other_bytes[""] / 2 for count in some)


def test_a_page_that_gets_its_name_while_it_is_looked_at_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a listing of its directory and a look at it."""
    tier = limited_tier(tmp_path)
    tier.open_namespace(NS)
    staged = tier.stage(NS, KEY, make_page(NS, "a"), num_tokens=128)
    assert staged is not None
    note = ShardWalk._note

    def publish_and_note(self: ShardWalk, leaf: Leaf, entry: os.DirEntry[str], shard: str) -> None:
        tier.publish(staged)
        note(self, leaf, entry, shard)

    monkeypatch.setattr(ShardWalk, "_note", publish_and_note)
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        count = count_stored(root, time.time_ns, lambda: None)
    finally:
        os.close(root)
    assert count.nbytes[""] == FILE


def test_salts_with_a_quota_are_counted_apart_and_a_small_one_with_its_own_error(
    tmp_path: Path,
) -> None:
    small, large, other = (salt_tag(name) for name in ("small", "large", "other"))
    for number in range(4000):
        tag = small if number % 40 == 0 else large if number % 2 else other
        key = (make_key(number)[:-8] + tag).hex()
        leaf = tmp_path / ("0" * 64) / key[:2] / key[2:4]
        leaf.mkdir(parents=True, exist_ok=True)
        (leaf / f"{key}.kv").write_bytes(b"x" * 4096)
    salts = [salt_account(small), salt_account(large)]
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        whole = count_stored(root, time.time_ns, lambda: None, salts=salts)
        some = [
            count_stored(root, time.time_ns, lambda: None, salts=salts, enough=1000)
            for _ in range(20)
        ]
    finally:
        os.close(root)

    assert whole.nbytes[salts[0]] == 100 * 4096 and whole.nbytes[salts[1]] == 2000 * 4096
    assert salt_account(other) not in whole.nbytes
    # Of the small one some 25 files are in a sample: two errors are 40%.
    assert sum(count.nbytes[salts[0]] >= 100 * 4096 for count in some) >= 15
    assert all(count.nbytes[salts[1]] < 1.3 * 2000 * 4096 for count in some)


def test_what_is_being_written_for_a_salt_counts_for_it(tmp_path: Path) -> None:
    """It has its own name soon, and nobody says so again."""
    tier = limited_tier(tmp_path)
    key = Key(make_key(1)[:-8] + salt_tag("one"))
    tier.open_namespace(NS)
    staged = tier.stage(NS, key, make_page(NS, "a"), num_tokens=1)
    assert staged is not None
    salts = [salt_account(salt_tag("one")), salt_account(salt_tag("two"))]
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        before = count_stored(root, time.time_ns, lambda: None, salts=salts)
        tier.publish(staged)
        after = count_stored(root, time.time_ns, lambda: None, salts=salts)
    finally:
        os.close(root)
    for count in (before, after):
        assert count.nbytes.get(salts[0], 0) == count.nbytes[""] == FILE
        assert count.nbytes.get(salts[1], 0) == 0
    assert after.other_bytes.get(salts[0], 0) == 0


def test_a_node_that_is_not_heard_of_writes_no_more(tmp_path: Path) -> None:
    """Others count what it was granted as written from then on."""
    now_s = 0.0
    allowance = Allowance("/store", quotas_of(1, {}, num_backends=1), 8, clock=lambda: now_s)
    allowance.take("namespace", KEY, FILE, manifest=b"")
    allowance.grant({"": 1 << 30})
    allowance.keep_until(10.0)
    allowance.take("namespace", KEY, FILE, manifest=b"")

    now_s = 10.1
    with pytest.raises(TierError):
        allowance.take("namespace", KEY, FILE, manifest=b"")
    allowance.keep_until(20.0)
    allowance.take("namespace", KEY, FILE, manifest=b"")


def test_what_was_not_written_after_all_is_given_back(tmp_path: Path) -> None:
    allowance = Allowance("/store", quotas_of(1, {"*": 1}, num_backends=1), 1)
    for _ in range(10):
        allowance.take("namespace", KEY, FILE, manifest=b"")
        allowance.give_back("namespace", KEY, FILE)
    assert {each.written_bytes for each in allowance.allowed().values()} == {0}


@given(
    st.integers(0, 100),
    st.lists(st.tuples(st.sampled_from(["write", "delete"]), st.integers(0, 100))),
)
def test_what_is_used_is_what_was_counted_and_written_less_what_was_deleted(
    counted: int, events: list[tuple[str, int]]
) -> None:
    """Also where more is deleted than was counted."""
    book = UsedBook()
    book.counted(StoredCount({"": counted, "ns": counted}, 0.0, 1), {})
    written, used = 0, counted
    for what, nbytes in events:
        if what == "write":
            written, used = written + nbytes, used + nbytes
        else:
            gone = min(nbytes, used)
            book.deleted({"": gone, "ns": gone})
            used -= gone
        account = NodeAccount(written, None)
        book.heard({"node": {"": account, "ns": account}})
        assert book.used_bytes("") == book.used_bytes("ns") == used


def test_a_node_that_falls_silent_may_have_written_all_that_it_was_granted() -> None:
    book = UsedBook()
    before = {"one": {"": NodeAccount(10, 20)}, "two": {"": NodeAccount(5, None)}}
    book.counted(StoredCount({"": 100}, 0.0, 1), before)
    book.heard({"one": {"": NodeAccount(15, 40)}, "two": {"": NodeAccount(6, 10)}})
    assert book.used_bytes("") == 100 + 5 + 1

    assert not book.is_unsure

    book.heard({"two": {"": NodeAccount(7, 10)}})
    assert book.most_bytes("") == 100 + 30 + 2
    assert book.used_bytes("") == 100 + 5 + 2, "nothing is deleted for what nobody may have written"
    assert book.is_unsure
    book.counted(StoredCount({"": 90}, 0.0, 1), {"two": {"": NodeAccount(7, 10)}})
    assert book.used_bytes("") == book.most_bytes("") == 90
    assert not book.is_unsure


@pytest.mark.parametrize("is_counted_meanwhile", [False, True])
def test_what_a_node_had_written_before_it_fell_silent_counts_once_when_it_is_back(
    is_counted_meanwhile: bool,
) -> None:
    """Else a node that was stopped for a while costs a store all that it keeps."""
    book = UsedBook()
    book.counted(StoredCount({"": 100}, 0.0, 1), {"one": {"": NodeAccount(80, 80)}})
    book.heard({"one": {"": NodeAccount(90, 90)}})
    book.heard({})
    if is_counted_meanwhile:
        book.counted(StoredCount({"": 110}, 0.0, 1), {})

    book.heard({"one": {"": NodeAccount(92, 95)}})
    assert book.used_bytes("") == 112
