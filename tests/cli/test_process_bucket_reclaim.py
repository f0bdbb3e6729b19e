"""`ucm reclaim` of a bucket, on a real server. What goes first is in
tests/store/inspect/test_bucket_reclaim.py: no server takes a time that is past."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.cli.buckets import BucketStore, bucket_settings, filled_bucket
from tests.cli.parts import ucm
from tests.faults.s3_server import S3Server
from tests.store.tiers.s3.conftest import server as server
from tests.store.tiers.s3.conftest import shared_server as shared_server
from tests.store.tiers.s3.s3_tiers import PREFIX
from ucm.store.inspect.bucket_reclaim import ReclaimedBucket

pytestmark = pytest.mark.process

GIB = 1 << 30
# Of an object of these stores.
OBJECT_BYTES = 24 << 10


@pytest.fixture
def store(tmp_path: Path, server: S3Server) -> BucketStore:
    return filled_bucket(tmp_path, server)


def reclaimed(*args: object, status: int = 0) -> ReclaimedBucket:
    done = ucm("reclaim", *args, "--json")
    assert done.returncode == status, done.stdout + done.stderr
    (found,) = msgspec.json.decode(done.stdout, type=list[ReclaimedBucket])
    return found


def gb(num_pages: float) -> str:
    return f"{num_pages * OBJECT_BYTES / GIB:.9f}"


def test_a_dry_run_tells_what_the_real_one_then_deletes(store: BucketStore) -> None:
    told = reclaimed(store.config, "--free-gb", gb(3), "--dry-run")
    assert (told.num_pages, told.stored_pages, store.num_pages()) == (3, 18, 18)

    done = reclaimed(store.config, "--free-gb", gb(3))
    assert (done.num_pages, done.freed_bytes, done.is_enough) == (3, told.freed_bytes, True)
    assert store.num_pages() == 15


def test_what_may_stay_stays(store: BucketStore) -> None:
    assert reclaimed(store.config, "--keep-gb", gb(5)).num_pages == 13
    assert store.num_pages() == 5


def test_all_that_is_old_goes_but_for_manifests_and_things_of_others(store: BucketStore) -> None:
    store.server.ask("PUT", f"{PREFIX}/notes.txt", b"not ours")

    assert reclaimed(store.config, "--older-than-days", 0).num_pages == 18
    left = store.server.ask("GET", "?list-type=2").decode()
    assert left.count("<Key>") == 3 and left.count("manifest.json</Key>") == 2
    assert store.server.has(f"{PREFIX}/notes.txt")


def test_what_is_young_stays_and_that_is_said(store: BucketStore) -> None:
    done = ucm("reclaim", store.config, "--free-gb", gb(3), "--grace-s", 120)
    assert done.returncode == 3 and store.num_pages() == 18
    assert "18 pages were written within the grace period (--grace-s)" in done.stderr


def test_where_more_was_wanted_than_there_is_that_is_said(store: BucketStore) -> None:
    done = ucm("reclaim", store.config, "--free-gb", 1, "--grace-s", 0)
    assert done.returncode == 3 and store.num_pages() == 0
    assert "no page is left: it held no more" in done.stderr and "grace" not in done.stderr


def test_bounds_end_it_with_what_to_do(store: BucketStore) -> None:
    done = ucm("reclaim", store.config, "--free-gb", gb(3), "--max-requests", 5)
    assert done.returncode == 3 and store.num_pages() == 18
    assert "not all was seen" in done.stderr and "--max-requests 5" in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "how much? One of --free-gb, --keep-gb and --older-than-days"),
        (("--free-gb", 1, "--keep-gb", 1), "how much?"),
        (("--free-gb", 1, "--tier", "posix"), "these settings have no such tier"),
        (("--free-gb", 1, "--tier", "disk"), "say posix or s3"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_goes(
    store: BucketStore, args: tuple[object, ...], said: str
) -> None:
    done = ucm("reclaim", store.config, *args)
    assert done.returncode == 1 and said in done.stderr
    assert store.num_pages() == 18


def test_a_directory_takes_no_options_of_buckets(tmp_path: Path) -> None:
    (tmp_path / "ucm-backend-id").write_text("0" * 16)
    done = ucm("reclaim", tmp_path, "--keep-gb", 1)
    assert done.returncode == 1 and "say --free-gb" in done.stderr


def test_a_server_that_is_away_is_one_line(tmp_path: Path, server: S3Server) -> None:
    config = bucket_settings(tmp_path, server, s3_endpoint="http://127.0.0.1:9")
    done = ucm("reclaim", config, "--free-gb", 1)
    assert done.returncode == 1 and done.stdout == ""
    assert "can't connect" in done.stderr and len(done.stderr.splitlines()) == 1
