"""Things that look like files and directories of the store, planted by whoever can write into it.

None holds up a thread, is read for long, or leads out of the store; what lies at a page's name is
moved aside, so that the page can be stored again.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.store.tiers.tier_contract import SMALL, content_of, dump, load, make_key, make_page
from ucm.errors import TierError
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import ReadStatus

KEY = make_key(1)
PAGE = make_page(SMALL, "a")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.mkdir()
    (path / "inside").touch()


def unix_socket(path: Path) -> None:
    short = Path("/tmp") / f"ucm-test-{os.getpid()}.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(short))
        os.rename(short, path)


def link_to_a_file(path: Path) -> None:
    other = path.parent / "other"
    other.write_bytes(bytes(100))
    path.symlink_to(other)


def link_to_nothing(path: Path) -> None:
    path.symlink_to(path.parent / "nothing")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse_file(path: Path) -> None:
    path.touch()
    os.truncate(path, 4 << 30)


THINGS = [fifo, directory, unix_socket, link_to_a_file, link_to_nothing, link_to_itself]
THINGS += [link_to_a_device, sparse_file]
planted = pytest.mark.parametrize("plant", THINGS, ids=lambda plant: plant.__name__)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def tier(store: Path) -> PosixTier:
    tier = PosixTier([str(store)])
    tier.open_namespace(SMALL)
    return tier


def place(store: Path) -> Path:
    """Of the page's file, whose directory is there."""
    path = Path(paths.block_path(str(store), SMALL.fingerprint, KEY))
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def quarantined(store: Path) -> list[Path]:
    folder = store / paths.QUARANTINE
    return sorted(folder.glob("*/*")) if folder.exists() else []


@planted
def test_what_lies_at_a_pages_name_and_is_no_page_is_moved_aside_by_who_reads(
    store: Path, tier: PosixTier, plant: Callable[[Path], None]
) -> None:
    path = place(store)
    plant(path)

    tier.contains(SMALL, [KEY])  # may say what it likes, and returns
    assert load(tier, SMALL, KEY) is ReadStatus.CORRUPT

    assert not os.path.lexists(path)
    assert len(quarantined(store)) == 1
    assert load(tier, SMALL, KEY) is ReadStatus.ABSENT
    dump(tier, SMALL, KEY, PAGE)
    assert load(tier, SMALL, KEY) == content_of(SMALL, PAGE)


@planted
def test_a_page_is_stored_where_something_else_lies(
    store: Path, tier: PosixTier, plant: Callable[[Path], None]
) -> None:
    """Without being read first: a producer only writes."""
    plant(place(store))
    dump(tier, SMALL, KEY, PAGE)
    assert load(tier, SMALL, KEY) == content_of(SMALL, PAGE)


@planted
def test_a_link_is_moved_and_not_what_it_leads_to(
    store: Path, tier: PosixTier, plant: Callable[[Path], None]
) -> None:
    path = place(store)
    plant(path)
    others = {other for other in path.parent.iterdir() if other != path}
    load(tier, SMALL, KEY)
    assert set(path.parent.iterdir()) == others


@planted
def test_a_manifest_that_is_none_is_an_error_that_says_so(
    store: Path, plant: Callable[[Path], None]
) -> None:
    """Of which only so much is read as a manifest can have."""
    manifest = Path(paths.manifest_path(str(store), SMALL.fingerprint))
    manifest.parent.mkdir(parents=True)
    plant(manifest)
    with pytest.raises(TierError, match=r"manifest\.json: .*remove it"):
        PosixTier([str(store)]).open_namespace(SMALL)
    with pytest.raises(TierError, match="remove it"):
        PosixTier([str(store)]).read_manifest(SMALL.fingerprint)


@planted
def test_the_id_of_a_backend_that_is_none_is_an_error_that_says_so(
    tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    backends = [tmp_path / "one", tmp_path / "two"]
    for backend in backends:
        backend.mkdir()
    plant(Path(paths.backend_id_path(str(backends[0]))))
    with pytest.raises(TierError, match="remove it"):
        PosixTier([str(backend) for backend in backends]).open_namespace(SMALL)


DIRECTORIES = [
    pytest.param(2, id="of the namespace"),
    pytest.param(1, id="of the first byte"),
    pytest.param(0, id="of the second byte"),
]


@pytest.mark.parametrize("level", DIRECTORIES)
def test_pages_are_not_written_through_a_directory_that_is_a_link(
    tmp_path: Path, store: Path, level: int
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    PosixTier([str(store)])
    linked = Path(paths.block_path(str(store), SMALL.fingerprint, KEY)).parents[level]
    linked.parent.mkdir(parents=True, exist_ok=True)
    linked.symlink_to(outside)
    with pytest.raises(TierError, match=r"is a link and no directory; remove it"):
        dump(PosixTier([str(store)]), SMALL, KEY, PAGE)
    assert list(outside.rglob("*.kv")) == list(outside.rglob("*.tmp")) == []


@pytest.mark.parametrize("name", ["quarantine", f"quarantine/{SMALL.fingerprint.hex()}"])
def test_nothing_is_moved_into_a_quarantine_that_is_a_link(
    tmp_path: Path, store: Path, tier: PosixTier, name: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (store / name).parent.mkdir(exist_ok=True)
    (store / name).symlink_to(outside)
    place(store).write_bytes(b"damaged")
    assert load(tier, SMALL, KEY) is ReadStatus.CORRUPT
    assert list(outside.iterdir()) == []


def test_nothing_is_moved_out_of_a_tree_that_a_link_leads_to(
    tmp_path: Path, store: Path, tier: PosixTier
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    path = Path(paths.block_path(str(store), SMALL.fingerprint, KEY))
    path.parent.parent.mkdir(parents=True)
    path.parent.symlink_to(outside)
    (outside / path.name).write_bytes(b"somebody's")
    assert load(tier, SMALL, KEY) is ReadStatus.CORRUPT
    assert (outside / path.name).read_bytes() == b"somebody's"


@pytest.mark.parametrize("plant", [link_to_nothing, link_to_itself, fifo])
def test_a_backend_that_is_no_directory_is_an_error_that_says_so(
    store: Path, plant: Callable[[Path], None]
) -> None:
    plant(store)
    with pytest.raises(TierError, match=str(store)):
        PosixTier([str(store)]).open_namespace(SMALL)
    with pytest.raises(TierError, match=str(store)):
        dump(PosixTier([str(store)]), SMALL, KEY, PAGE)


def test_a_backend_may_be_a_link_to_a_directory(tmp_path: Path, store: Path) -> None:
    (tmp_path / "real").mkdir()
    store.symlink_to(tmp_path / "real")
    tier = PosixTier([str(store)])
    dump(tier, SMALL, KEY, PAGE)
    assert load(tier, SMALL, KEY) == content_of(SMALL, PAGE)


def test_a_store_that_is_emptied_under_its_writer_is_filled_again(
    store: Path, tier: PosixTier
) -> None:
    """Directories that were looked at once are looked at again."""
    dump(tier, SMALL, KEY, PAGE)
    for path in store.iterdir():
        if path.name != paths.BACKEND_ID:
            shutil.rmtree(path)
    dump(tier, SMALL, KEY, PAGE)
    assert load(tier, SMALL, KEY) == content_of(SMALL, PAGE)
    assert Path(paths.manifest_path(str(store), SMALL.fingerprint)).exists()
