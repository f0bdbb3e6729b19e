"""`ucm reclaim` goes by the clock that files' times are by, whatever this machine's says."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.faults.mounts import mount_read_only, mount_tmpfs, own_mounts
from tests.store.tiers.tier_contract import dump, make_key, make_namespace, make_page
from ucm.errors import UcmError
from ucm.store.inspect.reclaim_now import ReclaimOrder, reclaim_now
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.tier import PosixTier

NS = make_namespace("model", page_bytes=60 << 10)
ALL = 1 << 30
HOURS_NS = 3 * 3600 * 10**9


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return filled(tmp_path / "store")


def filled(path: Path) -> Path:
    tier = PosixTier([str(path)])
    tier.open_namespace(NS)
    for number in range(5):
        dump(tier, NS, make_key(number), make_page(NS, "a"))
    return path


def turn_this_clock(monkeypatch: pytest.MonkeyPatch, by_ns: int) -> None:
    right_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: right_ns() + by_ns)


def test_a_machine_that_is_ahead_deletes_nothing_within_the_grace_period(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn_this_clock(monkeypatch, HOURS_NS)
    done = reclaim_now(str(store), ReclaimOrder(free_bytes=ALL, grace_s=120.0))
    assert (done.num_files, done.num_young, done.num_kept) == (0, 5, 5)
    assert not done.is_own_clock


def test_a_machine_that_is_behind_deletes_what_it_may(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn_this_clock(monkeypatch, -HOURS_NS)
    time.sleep(0.02)  # a tick of the filesystem's
    done = reclaim_now(str(store), ReclaimOrder(free_bytes=ALL, grace_s=0.0))
    assert (done.num_files, done.num_young, done.num_kept) == (5, 0, 0)


@own_mounts
def test_a_dry_run_where_nothing_may_be_written_says_by_which_clock(
    store: Path, tmp_path: Path
) -> None:
    mount_read_only(store, tmp_path / "mnt")
    order = ReclaimOrder(free_bytes=ALL, grace_s=120.0, is_dry=True)
    done = reclaim_now(str(tmp_path / "mnt"), order)
    assert (done.num_young, done.is_own_clock) == (5, True)


@own_mounts
def test_a_filesystem_without_room_for_one_more_file_tells_its_time_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount_tmpfs(tmp_path / "store", size_bytes=8 << 20, max_inodes=100)
    store = filled(tmp_path / "store")
    while os.statvfs(store).f_favail:
        (store / f"more-{os.statvfs(store).f_favail}").touch()
    turn_this_clock(monkeypatch, HOURS_NS)
    done = reclaim_now(str(store), ReclaimOrder(free_bytes=ALL, grace_s=120.0))
    assert (done.num_files, done.num_young, done.is_own_clock) == (0, 5, False)


def test_what_the_clock_is_asked_by_is_swept_if_it_is_killed_there(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "unlink", lambda *args, **more: None)
    order = ReclaimOrder(free_bytes=ALL, grace_s=120.0, is_dry=True)
    assert reclaim_now(str(store), order).num_young == 5
    (left,) = (path.name for path in store.iterdir() if path.name.endswith(paths.TEMP_SUFFIX))
    assert paths.parse_temp_name(left) is not None


def test_what_lies_in_the_leases_place_is_named_with_its_path(store: Path) -> None:
    os.mkfifo(store / paths.RECLAIM_LEASE)
    with pytest.raises(UcmError, match=f"^{store / paths.RECLAIM_LEASE}: is a FIFO and no file"):
        reclaim_now(str(store), ReclaimOrder(free_bytes=ALL))
