"""`ucm reclaim`: what it frees, what it leaves alone, and who else may be at it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from tests.cli.conftest import PROMPT
from tests.cli.parts import Store, keys_of, manifest, settings_file, ucm
from ucm.store.inspect.reclaim_now import ReclaimedNow
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.lease import ReclaimLease

pytestmark = pytest.mark.process

A = manifest("a")
GIB = 1 << 30
# What a page of these stores takes on the disk, header included.
ON_DISK_BYTES = 24 << 10


def reclaimed(*args: object, status: int = 0) -> ReclaimedNow:
    done = ucm("reclaim", *args, "--json")
    assert done.returncode == status, done.stderr
    (found,) = msgspec.json.decode(done.stdout, type=list[ReclaimedNow])
    return found


def gb(num_pages: float) -> str:
    return f"{num_pages * ON_DISK_BYTES / GIB:.9f}"


def pages(store: Store) -> set[Path]:
    return set(store.path.rglob("*.kv"))


def test_a_dry_run_tells_what_the_real_one_then_deletes(filled: Store) -> None:
    before = filled.names()
    asked = filled.path, "--free-gb", gb(3), "--grace-s", 0
    told = reclaimed(*asked, "--dry-run")
    assert filled.names() == before
    assert (told.num_files, told.is_enough) == (3, True)

    done = reclaimed(*asked)
    assert (done.num_files, done.freed_bytes) == (told.num_files, told.freed_bytes)
    assert len(pages(filled)) == 18 - 3
    assert {path.name for path in filled.path.iterdir()} == {
        paths.RECLAIM_RECORD,
        *(path.split("/")[0] for path in before),
    }, "no lease stays behind"


def test_what_was_used_longest_ago_goes_first(filled: Store) -> None:
    old = [filled.file(A, key) for key in keys_of(A, PROMPT, salt="one")[:4]]
    for path in old:
        os.utime(path, (1.0, 1.0))
    reclaimed(filled.path, "--free-gb", gb(4), "--grace-s", 0)
    assert not any(path.exists() for path in old)
    assert len(pages(filled)) == 18 - 4


def test_what_is_young_stays_and_that_is_said(filled: Store) -> None:
    done = ucm("reclaim", filled.path, "--free-gb", gb(3))
    assert done.returncode == 3
    assert done.stderr == (
        f"{filled.path}: 18 pages were written or used within the grace period (--grace-s)\n"
    )
    assert len(pages(filled)) == 18


def test_when_no_page_is_left_nothing_is_said_of_a_grace_period(filled: Store) -> None:
    done = ucm("reclaim", filled.path, "--free-gb", 1, "--grace-s", 0)
    assert done.returncode == 3
    assert "18 pages deleted" in done.stdout and not pages(filled)
    assert done.stderr.startswith(f"{filled.path}: no page is left: ")
    assert "grace" not in done.stderr


def test_one_at_a_time_reclaims_unless_it_is_forced(filled: Store) -> None:
    root = os.open(filled.path, os.O_RDONLY | os.O_DIRECTORY)
    lease = ReclaimLease(60.0, 5.0)
    try:
        assert lease.hold(root)
        asked = filled.path, "--free-gb", gb(1), "--grace-s", 0
        done = ucm("reclaim", *asked)
        assert done.returncode == 1
        assert f"process {os.getpid()} on " in done.stderr and "--force" in done.stderr
        assert reclaimed(*asked, "--dry-run").num_files == 1
        assert len(pages(filled)) == 18
        assert reclaimed(*asked, "--force").num_files == 1
        assert lease.still_held(root)
    finally:
        lease.release(root)
        os.close(root)


def test_a_settings_file_says_how_much_may_stay(filled: Store, tmp_path: Path) -> None:
    config = settings_file(
        tmp_path,
        filled.path,
        posix_capacity_gb=float(gb(10)),
        posix_gc_trigger_threshold_ratio=0.5,
        posix_gc_grace_sec=0,
    )

    assert reclaimed(config).is_enough
    assert len(pages(filled)) == 5
    assert ucm("reclaim", config).stdout.endswith("0 pages deleted, 0 B.\n")


def test_how_much_has_to_be_said_somewhere(filled: Store) -> None:
    done = ucm("reclaim", filled.path)
    assert done.returncode == 1 and "--free-gb" in done.stderr
