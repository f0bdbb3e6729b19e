"""What was asked for is in the times of files, and reclaim goes by them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.store.tiers.posix.reclaim_parts import limited_tier
from tests.store.tiers.tier_contract import SMALL, dump, make_key, make_page
from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix.page_times import PageTimes
from ucm.store.tiers.posix.score import MAX_AHEAD_NS, SECOND_NS, bounded_score_ns
from ucm.store.tiers.posix.tier import PosixTier

GIB = 1 << 30


@pytest.fixture
def tier(tmp_path: Path) -> PosixTier:
    made = limited_tier(tmp_path, limit_bytes=GIB)
    made.open_namespace(SMALL)
    return made


def _times(store: Path) -> dict[Key, int]:
    """Of the pages that are there."""
    return {
        Key(bytes.fromhex(path.name.split(".")[0])): path.stat().st_mtime_ns
        for path in store.rglob("*.kv")
    }


def _dump(tier: PosixTier, *numbers: int) -> None:
    for number in numbers:
        dump(tier, SMALL, make_key(number), make_page(SMALL, "a"))


def _pause(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    later_ns = time.time_ns() + int(seconds * SECOND_NS)
    monkeypatch.setattr(time, "time_ns", lambda: later_ns)


def test_a_block_that_was_asked_for_before_is_written_with_a_later_time(
    tier: PosixTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its page was ever there: it may have been reclaimed meanwhile."""
    tier.asked([make_key(1), make_key(2)])
    _pause(monkeypatch, 5)
    tier.asked([make_key(1), make_key(3)])
    _dump(tier, 1, 2, 3)
    times = _times(tmp_path)
    assert times[make_key(1)] > time.time_ns() > times[make_key(3)]


def test_a_use_moves_the_time_of_a_page_on_and_never_back(
    tier: PosixTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _dump(tier, 1)
    seen = [_times(tmp_path)[make_key(1)]]
    for _ in range(5):
        _pause(monkeypatch, 60)
        tier.asked([make_key(1)])
        for _ in range(2):
            tier.touch(SMALL, [make_key(1)])
            seen.append(_times(tmp_path)[make_key(1)])
    assert seen == sorted(seen) and len(set(seen)) == 6


def test_a_page_that_is_used_has_changed_though_its_score_has_not(tmp_path: Path) -> None:
    """Else it would not be young, and what somebody is about to read could go."""
    path, times, key = tmp_path / "page", PageTimes(), make_key(1)
    path.write_bytes(b"x")
    times.asked([key])
    times.touch(str(path), key)
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        times.touch(str(path), key)
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_page_that_is_not_there_is_not_touched(tier: PosixTier, tmp_path: Path) -> None:
    tier.touch(SMALL, [make_key(1)])
    assert not _times(tmp_path)


def test_without_a_limit_files_have_the_time_when_they_were_written(tmp_path: Path) -> None:
    tier = PosixTier([str(tmp_path)])
    before_ns = time.time_ns()
    tier.asked([make_key(1)])
    _dump(tier, 1)
    assert _times(tmp_path)[make_key(1)] > before_ns - SECOND_NS


def test_a_file_from_the_far_future_is_as_old_as_its_last_change(
    tier: PosixTier, tmp_path: Path
) -> None:
    _dump(tier, 1)
    (path,) = tmp_path.rglob("*.kv")
    now_ns = time.time_ns()
    os.utime(path, ns=(now_ns, now_ns + 10 * MAX_AHEAD_NS))
    found = path.stat()
    assert bounded_score_ns(found.st_mtime_ns, found.st_ctime_ns) == found.st_ctime_ns
