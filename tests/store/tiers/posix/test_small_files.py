"""What lies under the names of reclaim's small files and is no such file: it is said in words that
name it, once it is removed all goes on, and what it does not concern goes on meanwhile."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.store.tiers.posix.reclaim_parts import MIB, limited_tier, reclaiming, until, write
from tests.store.tiers.tier_contract import make_namespace
from ucm.errors import TierError
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.lease import ReclaimLease
from ucm.store.tiers.posix.rights import UMASK_DECIDES
from ucm.store.tiers.posix.small_files import read_small, write_small

NS = make_namespace("model", page_bytes=60 << 10)  # 64 KiB a file
OTHER = make_namespace("another", page_bytes=60 << 10)
LIMIT = 8 * MIB
NAME = "ucm-small"


def directory(path: Path) -> None:
    path.mkdir()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def long_file(path: Path) -> None:
    path.write_bytes(bytes((1 << 20) + 1))


PLANTS = pytest.mark.parametrize("plant", [directory, fifo, link, long_file])
WORDS = {
    directory: "is a directory and no file",
    fifo: "is a FIFO and no file",
    link: "is a link and no file",
    long_file: "has more than 1048576 bytes",
}


@pytest.fixture
def root(tmp_path: Path) -> int:
    return os.open(tmp_path, os.O_RDONLY)


@PLANTS
def test_what_is_no_such_file_is_named_with_what_to_do(
    root: int, tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    plant(tmp_path / NAME)
    with pytest.raises(TierError) as raised:
        read_small(root, NAME)
    assert str(raised.value) == f"{NAME}: {WORDS[plant]}; remove it"


def test_one_that_this_user_may_not_read_names_the_settings(root: int, tmp_path: Path) -> None:
    (tmp_path / NAME).touch(0o200)
    user = os.geteuid()
    try:
        if user == 0:  # who may read everything
            os.seteuid(65_534)
        with pytest.raises(TierError, match=f"{NAME}: this user may not read it: .*file_mode"):
            read_small(root, NAME)
    finally:
        os.seteuid(user)


def test_a_write_that_storage_cuts_short_goes_on_and_one_that_it_refuses_leaves_the_old_content(
    root: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: write(fd, content[:3]))
    write_small(root, NAME, b"all of it", UMASK_DECIDES)
    assert read_small(root, NAME) == b"all of it"

    taken = iter([3, 0])
    monkeypatch.setattr(os, "write", lambda fd, content: write(fd, content[: next(taken)]))
    with pytest.raises(OSError, match="storage takes no more bytes"):
        write_small(root, NAME, b"something new", UMASK_DECIDES)
    assert read_small(root, NAME) == b"all of it"
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@PLANTS
def test_nobody_holds_a_lease_that_is_none_and_that_is_said(
    root: int, tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    plant(tmp_path / paths.RECLAIM_LEASE)
    lease = ReclaimLease(60.0, 7.5)
    with pytest.raises(TierError, match=f"{paths.RECLAIM_LEASE}: {WORDS[plant]}; remove it"):
        lease.hold(root)
    lease.release(root)
    assert not lease.is_held


@pytest.mark.parametrize("name", [paths.RECLAIM_LEASE, paths.RECLAIM_GRANTS])
@PLANTS
def test_a_node_says_what_is_in_the_way_and_writes_once_it_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, plant: Callable[[Path], None]
) -> None:
    store = tmp_path / "store"
    tier = limited_tier(store, limit_bytes=LIMIT, queue_pages=2)
    tier.open_namespace(NS)
    plant(store / name)
    with caplog.at_level(logging.WARNING), reclaiming(tier) as node:
        # What can be replaced is: only a lease has to be left to whoever may hold it.
        if name == paths.RECLAIM_LEASE or plant is directory:
            said = f"{store}: reclaim has to wait: {name}: {WORDS[plant]}; remove it"
            until(lambda: said in caplog.messages, "it is not said")
            assert not node["reclaim_leases"]
            (store / name).rename(tmp_path / "away")
        until(lambda: all(write(tier, NS, number) for number in range(20)), "nothing is granted")


@PLANTS
def test_what_is_no_nodes_file_is_said_and_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, plant: Callable[[Path], None]
) -> None:
    store = tmp_path / "store"
    tier = limited_tier(store, limit_bytes=LIMIT, queue_pages=2)
    tier.open_namespace(NS)
    name = paths.reclaim_node_name("0" * 16)
    plant(store / name)
    with caplog.at_level(logging.WARNING), reclaiming(tier):
        until(lambda: all(write(tier, NS, number) for number in range(20)), "nothing is granted")
        until(lambda: f"{name}: {WORDS[plant]}; remove it" in caplog.text, "it is not said")


@PLANTS
def test_a_manifest_that_is_none_stops_no_reclaim(
    tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    store = tmp_path / "store"
    tier = limited_tier(store, quota_bytes={"*": LIMIT}, queue_pages=2)
    tier.open_namespace(NS)
    assert write(tier, OTHER, 1)
    manifest = Path(paths.manifest_path(str(store), OTHER.fingerprint))
    manifest.unlink()
    plant(manifest)
    with reclaiming(tier):
        until(lambda: all(write(tier, NS, number) for number in range(20)), "nothing is granted")
