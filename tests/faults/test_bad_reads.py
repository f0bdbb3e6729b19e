"""One node reads badly, and the files are good: it must not take them away from the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fuse import mount_fuse, needs_fuse
from tests.store.tiers.tier_contract import LARGE, content_of, dump, load, make_key, make_page
from ucm.store.tiers.per_minute import PerMinute
from ucm.store.tiers.posix.paths import QUARANTINE
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import ReadStatus

pytestmark = [pytest.mark.process, needs_fuse]

KEYS = [make_key(i) for i in range(12)]


def in_quarantine(store: Path) -> int:
    return sum(path.is_file() for path in (store / QUARANTINE).rglob("*"))


def fill(store: Path) -> PosixTier:
    tier = PosixTier([str(store)])
    tier.open_namespace(LARGE)
    for key in KEYS:
        dump(tier, LARGE, key, make_page(LARGE, "a"))
    return tier


@pytest.mark.parametrize("direct_io", [False, True])
def test_a_node_that_reads_everything_badly_leaves_nearly_all_files_to_the_others(
    tmp_path: Path, direct_io: bool
) -> None:
    store = tmp_path / "source"
    store.mkdir()
    there = fill(store)
    with mount_fuse(store, tmp_path / "mounted") as mount:
        here = PosixTier([str(mount.path)], direct_io=direct_io, quarantine_per_minute=2)
        here.open_namespace(LARGE)
        mount.corrupt_reads()
        for key in KEYS:
            assert load(here, LARGE, key) is ReadStatus.CORRUPT

    assert in_quarantine(store) == 2
    found = [load(there, LARGE, key) for key in KEYS]
    assert found.count(content_of(LARGE, make_page(LARGE, "a"))) == 10


@pytest.mark.parametrize("direct_io", [False, True])
def test_a_page_that_is_right_when_it_is_read_once_more_is_a_hit_and_stays(
    tmp_path: Path, direct_io: bool
) -> None:
    """Also where the page cache keeps what was read wrongly."""
    store = tmp_path / "source"
    store.mkdir()
    fill(store)
    with mount_fuse(store, tmp_path / "mounted") as mount:
        here = PosixTier([str(mount.path)], direct_io=direct_io)
        here.open_namespace(LARGE)
        for key in KEYS:
            mount.corrupt_reads(times=1)
            assert load(here, LARGE, key) == content_of(LARGE, make_page(LARGE, "a"))

    assert in_quarantine(store) == 0


def test_more_files_may_be_moved_a_minute_later() -> None:
    now_s = 0.0
    moves = PerMinute(2, lambda: now_s)
    assert [moves.may() for _ in range(3)] == [True, True, False]
    now_s = 61.0
    assert [moves.may() for _ in range(3)] == [True, True, False]
    assert not PerMinute(0).may()
