"""`ucm verify` and `ucm inspect` on a bucket of a real server: as of files."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.cli.buckets import A, B, BucketStore, bucket_settings, filled_bucket
from tests.cli.conftest import PROMPT
from tests.cli.parts import PAGE_BYTES, Store, keys_of, manifest, tail_of, ucm
from tests.faults.s3_server import BUCKET, S3Server
from tests.store.tiers.s3.conftest import server as server
from tests.store.tiers.s3.conftest import shared_server as shared_server
from tests.store.tiers.s3.s3_tiers import PREFIX
from ucm.store.blocks.blockfile import HEADER_BYTES
from ucm.store.blocks.page_key import PageKey, load_page_key
from ucm.store.inspect.page_report import PageReport
from ucm.store.inspect.verified import Verified

pytestmark = pytest.mark.process
OBJECT_BYTES = 24 << 10
ONE, OTHER = keys_of(A, PROMPT, salt="one")[:2]


@pytest.fixture
def store(tmp_path: Path, server: S3Server) -> BucketStore:
    return filled_bucket(tmp_path, server)


def verified(*args: object, status: int) -> Verified:
    done = ucm("verify", *args, "--json")
    assert (done.returncode, done.stderr) == (status, ""), done.stdout
    return msgspec.json.decode(done.stdout, type=Verified)


def inspected(*args: object, status: int = 0) -> list[PageReport]:
    done = ucm("inspect", *args, "--json")
    assert done.returncode == status, done.stderr
    return msgspec.json.decode(done.stdout, type=list[PageReport])


def change(store: BucketStore, name: str, how: Callable[[bytes], bytes]) -> None:
    store.server.ask("PUT", name, how(store.server.ask("GET", name)))


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda whole: whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]


def sealed(tmp_path: Path, server: S3Server) -> tuple[BucketStore, PageKey]:
    file = tmp_path / "page.key"
    file.write_text("ab" * 32 + "\n")
    file.chmod(0o600)
    key = load_page_key(str(file))
    store = BucketStore(server, bucket_settings(tmp_path, server, page_key_file=str(file)))
    store.put(A, keys_of(A, PROMPT), key)
    return store, key


def test_a_whole_bucket_is_said_to_be_whole(store: BucketStore) -> None:
    done = ucm("verify", store.config)
    assert done.returncode == 0 and done.stdout.startswith("18 pages are whole; 432.0 KiB read")


def test_every_kind_of_damage_is_found_and_nothing_is_changed(store: BucketStore) -> None:
    names = [store.name(A, key) for key in keys_of(A, PROMPT, salt="one")]
    change(store, names[0], flipped(HEADER_BYTES + 9))
    change(store, names[1], flipped(20))
    change(store, names[2], lambda whole: whole[:-1])
    change(store, names[3], lambda whole: whole[:100])
    change(store, names[4], lambda whole: store.server.ask("GET", names[5]))
    before = store.server.ask("GET", "?list-type=2")

    found = verified(store.config, status=3)

    assert (found.num_damaged, found.num_whole) == (5, 13)
    why = {each.path.removeprefix(f"s3://{BUCKET}/"): each.why for each in found.files}
    assert set(why) == set(names[:5])
    assert why[names[0]].startswith("checksum of bytes [0, 20001) of the page differs")
    assert why[names[2]] == f"{OBJECT_BYTES - 1} bytes long, expected {OBJECT_BYTES}"
    assert why[names[3]] == "is shorter than a header" and why[names[4]].startswith("holds block ")
    assert store.server.ask("GET", "?list-type=2") == before


def test_quarantine_moves_what_is_damaged_and_nothing_else(store: BucketStore) -> None:
    name = store.name(B, keys_of(B, PROMPT)[0])
    change(store, name, flipped(5000))

    found = verified(store.config, "--quarantine", status=3)

    assert (found.num_damaged, found.num_quarantined) == (1, 1) and not store.server.has(name)
    assert f"moved to {PREFIX}/quarantine/" in found.files[0].done
    assert verified(store.config, status=0).num_whole == 17
    (report,) = inspected(keys_of(B, PROMPT)[0].hex(), store.config, status=3)
    assert not report.is_at_home and "/quarantine/" in report.path


def test_a_manifest_that_is_damaged_is_told(store: BucketStore) -> None:
    folder = store.name(A, ONE).rsplit("/", 2)[0]
    store.server.ask("PUT", f"{folder}/manifest.json", b"{")
    found = verified(store.config, status=3)
    (bad,) = found.files
    assert bad.path.endswith("/manifest.json") and found.num_whole == 18
    assert "remove it, and the next engine of its model writes it anew" in bad.why


def test_pages_of_another_version_are_counted_and_left_alone(store: BucketStore) -> None:
    """They lie in a namespace of their own, whose manifest says so; in ours it is damage."""
    newer = manifest("a", page_format_version=2)
    store.put(newer, keys_of(newer, PROMPT)[:1])
    for name in (store.name(newer, keys_of(newer, PROMPT)[0]), store.name(A, ONE)):
        change(store, name, lambda whole: whole[:8] + (2).to_bytes(4, "little") + whole[12:])
    found = verified(store.config, status=3)
    assert (found.num_other_version, found.num_damaged, found.num_whole) == (1, 1, 17)


def test_files_near_and_a_bucket_far_are_both_read(store: BucketStore, tmp_path: Path) -> None:
    near = Store(tmp_path / "near")
    near.put(A, keys_of(A, PROMPT, salt="one"))
    settings = {"store_pipeline": "Cache|Posix|S3", "storage_backends": str(near.path)}
    config = bucket_settings(tmp_path, store.server, **settings)
    change(store, store.name(A, ONE), flipped(5000))
    found = verified(config, status=3)
    assert (found.num_whole, found.num_damaged) == (6 + 17, 1)
    whole, damaged = inspected(ONE.hex(), config, status=3)
    assert whole.path.startswith(str(near.path)) and damaged.path.startswith("s3://")


def test_things_of_others_are_counted_and_not_read(store: BucketStore) -> None:
    folder = store.name(A, ONE).rsplit("/", 1)[0]
    store.server.ask("PUT", f"{folder}/notes.txt", b"x")
    store.server.ask("PUT", f"{PREFIX}/notes.txt", b"x")
    found = verified(store.config, status=0)
    assert (found.num_misplaced, found.num_whole) == (1, 18)


def test_seals_are_checked_with_their_key_and_told_apart_without(
    tmp_path: Path, server: S3Server
) -> None:
    store, _ = sealed(tmp_path, server)
    assert verified(store.config, status=0).num_whole == 6
    without = bucket_settings(tmp_path, server)
    assert verified(without, status=0).num_sealed_by_another_key == 6


def test_it_reads_no_faster_than_it_may(tmp_path: Path, server: S3Server) -> None:
    from ucm.store.inspect.bucket_verify import ReadPace

    pace = ReadPace(1 << 20)
    began_s = time.monotonic()
    for _ in range(5):
        pace.wait(1 << 18)
    # The first goes at once.
    assert 1.0 <= time.monotonic() - began_s < 3.0


def test_a_bucket_that_can_not_be_listed_is_one_line(tmp_path: Path, server: S3Server) -> None:
    away = bucket_settings(tmp_path, server, s3_endpoint="http://127.0.0.1:9")
    for args in (("verify", away), ("inspect", "abcdef", away)):
        done = ucm(*args)
        assert done.returncode == 1 and done.stdout == ""
        assert "can't connect" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_page_is_shown_by_the_beginning_of_its_key_or_its_url(store: BucketStore) -> None:
    tail = tail_of(A, PROMPT)
    store.put(A, [tail])
    (one,) = inspected(ONE.hex()[:16], store.config)
    assert (one.condition, one.model, one.page_bytes, one.file_bytes) == (
        *("whole", "a"),
        *(PAGE_BYTES, OBJECT_BYTES),
    )
    assert one.path == f"s3://{BUCKET}/{store.name(A, ONE)}" and one.is_at_home
    assert inspected(one.path, store.config) == [one]
    (its,) = [each for each in inspected(tail.hex(), store.config) if each.is_tail]
    assert its.num_tokens == tail.num_tokens
    shown = ucm("inspect", ONE.hex(), store.config).stdout
    assert "written" in shown and "rights" not in shown and "1 page is right, 0 not." in shown


def test_a_damaged_page_is_shown_with_what_is_wrong(store: BucketStore) -> None:
    change(store, store.name(A, ONE), flipped(5000))
    (report,) = inspected(ONE.hex(), store.config, status=3)
    assert report.condition == "damaged" and report.why.startswith("checksum of bytes")


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("0123456789", "no page whose key begins so in s3://"),
        (f"s3://{BUCKET}/{PREFIX}/nothing", "is not there"),
        (f"s3://{BUCKET}/{PREFIX}/notes.txt", "is no page file"),
        ("s3://another/name", "name a settings file instead"),
    ],
)
def test_what_is_no_page_is_refused_in_one_line(store: BucketStore, page: str, said: str) -> None:
    store.server.ask("PUT", f"{PREFIX}/notes.txt", b"x")
    done = ucm("inspect", page, store.config)
    assert done.returncode == 1 and done.stdout == ""
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
