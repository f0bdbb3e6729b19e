"""Namespaces and salts keep to quotas of their own, and nobody else gives for them."""

from __future__ import annotations

import time
from pathlib import Path

from tests.store.tiers.posix.reclaim_parts import (
    MIB,
    disk_bytes,
    limited_tier,
    reclaiming,
    stored,
    until,
    write,
    write_many,
)
from tests.store.tiers.tier_contract import make_namespace
from ucm.store.blocks.keys import salt_tag

NS = make_namespace("model", page_bytes=60 << 10)  # 64 KiB a file
OTHER = make_namespace("another", page_bytes=60 << 10)
FILE = 64 << 10


def test_each_namespace_keeps_to_its_own_quota(tmp_path: Path) -> None:
    """One is written at full speed, and nothing of the other goes."""
    names = [NS.fingerprint.hex()[:12], OTHER.fingerprint.hex()]
    tier = limited_tier(tmp_path, quota_bytes={names[0]: 2 * MIB, names[1]: 4 * MIB})
    with reclaiming(tier) as node:
        for number in range(30):
            until(lambda number=number: write(tier, OTHER, number), "there is room")  # type: ignore[misc]
        write_many(lambda number: write(tier, NS, number), 10 * 2 * MIB // FILE)

        assert disk_bytes(tmp_path / names[1]) >= 30 * FILE
        ours = disk_bytes(tmp_path / NS.fingerprint.hex())
        assert MIB < ours <= 2 * MIB + FILE
        assert node["reclaimed_files_quota"] > 0 == node["reclaimed_files_capacity"]


def test_two_models_and_two_salts_each_keep_to_their_own_quota(tmp_path: Path) -> None:
    """Two salts in two namespaces, each written at full speed, beside pages without a salt."""
    quotas = {"salt:one": MIB, f"salt-tag:{salt_tag('two').hex()}": 2 * MIB}
    models = {NS.fingerprint.hex(): 2 * MIB, OTHER.fingerprint.hex(): 3 * MIB}
    tier = limited_tier(tmp_path, quota_bytes=quotas | models)

    def used(salt: str) -> int:
        return sum(FILE for _ in tmp_path.rglob(f"*{salt_tag(salt).hex()}.kv"))

    with reclaiming(tier) as node:
        deadline_s = time.monotonic() + 60
        number = 0
        while node["reclaimed_files_quota"] < 300:
            write(tier, (NS, OTHER)[number // 3 % 2], number, salt=("one", "two", "")[number % 3])
            number += 1
            if number % 50 == 0:
                assert used("one") <= MIB and used("two") <= 2 * MIB
                for name, limit in models.items():
                    assert disk_bytes(tmp_path / name) <= limit + 64 * 4096
                assert time.monotonic() < deadline_s
        assert node["reclaimed_files_capacity"] == 0
    # A quota keeps something: it is not kept by keeping nothing.
    assert used("one") > MIB // 3 and used("two") > 2 * MIB // 3


def test_a_salt_without_a_quota_beside_one_that_has_one_is_left_alone(tmp_path: Path) -> None:
    tier = limited_tier(tmp_path, quota_bytes={"salt:one": MIB})
    with reclaiming(tier) as node:
        write_many(lambda number: write(tier, NS, number, salt="one"), 100)
        for number in range(50):
            assert write(tier, NS, number, salt="two")
        until(lambda: node["reclaimed_files_quota"], "the one is reclaimed")
        left = stored(tmp_path, NS.fingerprint)
    ends = [name.removesuffix(".kv")[-16:] for name in left]
    assert ends.count(salt_tag("two").hex()) == 50
    assert 0 < ends.count(salt_tag("one").hex()) <= MIB // FILE


def test_a_namespace_without_a_quota_beside_one_that_has_one_is_left_alone(tmp_path: Path) -> None:
    tier = limited_tier(tmp_path, quota_bytes={NS.fingerprint.hex(): MIB})
    with reclaiming(tier):
        write_many(lambda number: write(tier, NS, number), 100)
        for number in range(50):
            assert write(tier, OTHER, number)
        assert len(stored(tmp_path, OTHER.fingerprint)) == 50
