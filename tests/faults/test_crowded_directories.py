"""A look for a page costs what it costs, however many names somebody has planted beside it."""

from __future__ import annotations

import os
import shutil
import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.fuse import FuseMount, mount_fuse, needs_fuse
from tests.store.tiers.tier_contract import SMALL, content_of, dump, load, make_key, make_page
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import ReadStatus

PAGE = make_page(SMALL, "a")
HERE = make_key(0)
# Far more than a listing's first answer holds.
CROWD = 20_000
# A page is written by way of 1 MiB; a listing of the crowd takes 3.7.
MOST_BYTES = 2 << 20


def leaf_of(store: Path) -> Path:
    return Path(paths.block_path(str(store), SMALL.fingerprint, HERE)).parent


def neighbour() -> bytes:
    """A key whose page would lie in the same directory."""
    return HERE[:-1] + bytes([HERE[-1] ^ 1])


def plant(directory: Path, num_names: int) -> None:
    """Names as pages have them, in the way that is fastest."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for number in range(num_names):
            os.mknod(f"{number:064x}.kv", stat.S_IFREG | 0o600, dir_fd=fd)
    finally:
        os.close(fd)


def looks(tier: PosixTier) -> dict[str, Callable[[], object]]:
    """What is asked of storage for a lookup, a load, a dump and a flush."""
    return {
        "contains": lambda: tier.contains(SMALL, [HERE, neighbour()]) == 1,
        "contains_now": lambda: tier.contains_now(SMALL, HERE),
        "not contains_now": lambda: not tier.contains_now(SMALL, neighbour()),
        "doubt": lambda: tier.doubt(SMALL, neighbour()) is None,
        "read": lambda: load(tier, SMALL, HERE) == content_of(SMALL, PAGE),
        "read nothing": lambda: load(tier, SMALL, neighbour()) is ReadStatus.ABSENT,
        "holds": lambda: tier.holds(SMALL, HERE),
        "dump": lambda: dump(tier, SMALL, neighbour(), PAGE),
        "dump what is there": lambda: not dump(tier, SMALL, HERE, PAGE),
    }


@pytest.mark.parametrize(
    "num_names",
    [CROWD, pytest.param(1_000_000, marks=[pytest.mark.long, pytest.mark.timeout(900)])],
)
def test_nothing_is_listed_whole_in_a_real_directory(tmp_path: Path, num_names: int) -> None:
    tier = PosixTier([str(tmp_path)])
    tier.open_namespace(SMALL)
    assert dump(tier, SMALL, HERE, PAGE)
    plant(leaf_of(tmp_path), num_names)
    try:
        for look in looks(PosixTier([str(tmp_path)])).values():
            look()  # what is imported or made once
        Path(paths.block_path(str(tmp_path), SMALL.fingerprint, neighbour())).unlink()

        for what, look in looks(tier).items():
            tracemalloc.start()
            try:
                assert look(), what
                assert tracemalloc.get_traced_memory()[1] < MOST_BYTES, what
            finally:
                tracemalloc.stop()
    finally:
        shutil.rmtree(leaf_of(tmp_path))


@needs_fuse
def test_the_server_of_a_mount_is_asked_for_the_beginning_of_a_listing_at_most(
    tmp_path: Path,
) -> None:
    below, store = tmp_path / "below", tmp_path / "store"
    with mount_fuse(below, store) as mount:
        tier = PosixTier([str(store)])
        tier.open_namespace(SMALL)
        assert dump(tier, SMALL, HERE, PAGE)
        alone = [_listings(mount, look) for look in looks(tier).values()]
        Path(paths.block_path(str(store), SMALL.fingerprint, neighbour())).unlink()

        plant(leaf_of(below), CROWD // 4)
        crowded = [_listings(mount, look) for look in looks(tier).values()]
        # A whole listing is fourteen parts.
        assert all(now <= then + 2 for now, then in zip(crowded, alone, strict=True)), crowded


def _listings(mount: FuseMount, look: Callable[[], object]) -> int:
    """How often the server was asked for a part of a listing."""
    before = mount.calls["readdir"]
    assert look()
    return mount.calls["readdir"] - before
