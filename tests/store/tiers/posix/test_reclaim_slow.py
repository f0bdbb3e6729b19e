"""Reclaim where storage takes its time, or nothing can be freed."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.store.tiers.posix.reclaim_parts import (
    MIB,
    PATIENCE_S,
    RULES,
    disk_bytes,
    limited_tier,
    patient,
    reclaiming,
    until,
    until_full,
    write,
)
from tests.store.tiers.posix.test_reclaim import FILE, NS, stored
from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix.reclaim_plan import WHOLE, Want
from ucm.store.tiers.posix.reclaim_record_files import ReclaimRecorder
from ucm.store.tiers.posix.reclaim_run import ReclaimRun
from ucm.store.tiers.posix.rights import UMASK_DECIDES


def test_a_page_that_is_being_written_while_the_store_is_counted_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage may take its time with it, so that no count finds it for long."""
    tier = limited_tier(tmp_path, limit_bytes=MIB, rules=patient(grace_s=3600))
    tier.open_namespace(NS)
    begins, goes_on, write_file = threading.Event(), threading.Event(), tier._write

    def slow(*args: Any) -> str:
        begins.set()
        goes_on.wait()
        return write_file(*args)

    monkeypatch.setattr(tier, "_write", slow)
    writer = threading.Thread(target=write, args=[tier, NS, 0], daemon=True)
    writer.start()
    assert begins.wait(PATIENCE_S)
    with reclaiming(tier) as node:
        until(lambda: node["stored_bytes"] == FILE, "it is counted, and what is not there yet")
        goes_on.set()
        writer.join()
        until(lambda: not write(tier, NS, 1 + len(stored(tmp_path, NS.fingerprint))), "full")
        assert disk_bytes(tmp_path / NS.fingerprint.hex()) <= MIB + 4096  # and its manifest


def test_a_node_that_can_free_nothing_beats_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or others would take the lease over, and it would write nothing more."""
    monkeypatch.setattr("ucm.store.tiers.posix.reclaim._FRUITLESS_GAP_S", 3600.0)
    tier = limited_tier(tmp_path, limit_bytes=MIB, rules=patient(grace_s=3600))
    (allowance,) = tier._allowances.values()
    with reclaiming(tier) as node:
        until_full(tier, NS, tmp_path, node)
        until(lambda: not allowance.take_refusals(), "it has heard of that")
        before_s = allowance._until_s
        until(lambda: allowance._until_s > before_s + RULES.stale_s, "it beats")


def test_a_run_in_slow_storage_frees_room_and_beats_long_before_it_has_seen_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files of the store would be one pool."""
    monkeypatch.setattr("ucm.store.tiers.posix.reclaim_run._POOL_S", 0.0)
    writer = limited_tier(tmp_path)
    for number in range(40):
        write(writer, NS, number)
    num_ticks = num_gone_first = 0

    def tick() -> None:
        nonlocal num_ticks
        num_ticks += 1

    def between(keys: list[Key], freed: object) -> None:
        nonlocal num_gone_first
        num_gone_first = num_gone_first or len(keys)

    recorder = ReclaimRecorder(UMASK_DECIDES)
    run = ReclaimRun(str(tmp_path), 0.0, time.time_ns, between, recorder, tick=tick)
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        done = run.run(root, {WHOLE: Want(20 * FILE, 0.5)})
    finally:
        os.close(root)
    # Each goes by chance.
    assert 8 <= done.files.total() <= 25
    assert 1 <= num_gone_first <= 5
    assert num_ticks >= 40
