"""A full disk costs the dumps that don't fit, and leaves nothing behind."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from tests.faults.mounts import mount_tmpfs, own_mounts, unmount
from tests.store.tiers.tier_contract import (
    BLOCK_TOKENS,
    LARGE,
    SMALL,
    content_of,
    dump,
    load,
    make_key,
    make_page,
)
from ucm.errors import TierError
from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import ReadStatus, Tier

MIB = 1 << 20


def stray_files(store: Path) -> list[Path]:
    return [path for path in store.rglob("*.tmp") if path.is_file()]


def dump_until_full(tier: Tier) -> tuple[list[Key], TierError]:
    page = make_page(LARGE, "a")
    stored: list[Key] = []
    for i in range(1000):
        try:
            dump(tier, LARGE, make_key(i), page)
        except TierError as error:
            return stored, error
        stored.append(make_key(i))
    raise AssertionError("the disk never filled up")


@own_mounts
def test_a_dump_that_does_not_fit_is_an_error_and_not_a_block(tmp_path: Path) -> None:
    store = tmp_path / "store"
    mount_tmpfs(store, size_bytes=20 * MIB)
    tier = PosixTier([str(store)])
    tier.open_namespace(LARGE)

    stored, error = dump_until_full(tier)

    assert error.reason == "full"
    assert str(store) in str(error)
    assert 5 <= len(stored) <= 9
    failed = make_key(len(stored))
    assert load(tier, LARGE, failed) is ReadStatus.ABSENT
    assert stray_files(store) == []


@own_mounts
def test_a_full_disk_is_still_read_from_and_written_to_when_there_is_room(tmp_path: Path) -> None:
    store = tmp_path / "store"
    mount_tmpfs(store, size_bytes=20 * MIB)
    tier = PosixTier([str(store)])
    stored, _ = dump_until_full(tier)

    for key in stored:
        assert load(tier, LARGE, key) == content_of(LARGE, make_page(LARGE, "a"))
    os.unlink(paths.block_path(str(store), LARGE.fingerprint, stored[0]))
    assert dump(tier, LARGE, make_key(len(stored)), make_page(LARGE, "a"))


@own_mounts
def test_a_disk_without_free_inodes_is_full(tmp_path: Path) -> None:
    store = tmp_path / "store"
    mount_tmpfs(store, size_bytes=20 * MIB, max_inodes=12)
    tier = PosixTier([str(store)])

    stored, error = dump_until_full(tier)

    assert stored
    assert error.reason == "full"
    assert stray_files(store) == []


@own_mounts
def test_a_namespace_that_can_not_be_written_down_is_an_error(tmp_path: Path) -> None:
    store = tmp_path / "store"
    mount_tmpfs(store, size_bytes=20 * MIB, max_inodes=2)

    with pytest.raises(TierError) as raised:
        PosixTier([str(store)]).open_namespace(LARGE)

    assert raised.value.reason == "full"
    assert paths.BACKEND_ID in str(raised.value)


def test_a_write_that_is_cut_short_is_an_error_and_not_a_block(tmp_path: Path) -> None:
    """A limit on file size: pwritev first writes a part of what it was given, then fails."""
    tier = PosixTier([str(tmp_path)])
    tier.open_namespace(LARGE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB + 100, limits[1]))
    try:
        with pytest.raises(TierError, match="File too large"):
            tier.stage(LARGE, make_key(1), make_page(LARGE, "a"), num_tokens=BLOCK_TOKENS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert stray_files(tmp_path) == []
    assert load(tier, LARGE, make_key(1)) is ReadStatus.ABSENT


def test_no_file_descriptors_left_is_an_io_error_and_harms_no_file(tmp_path: Path) -> None:
    tier = PosixTier([str(tmp_path)])
    dump(tier, SMALL, make_key(1), make_page(SMALL, "a"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        found = load(tier, SMALL, make_key(1))
        with pytest.raises(TierError, match="Too many open files"):
            tier.stage(SMALL, make_key(2), make_page(SMALL, "b"), num_tokens=BLOCK_TOKENS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    assert found is ReadStatus.IO_ERROR
    assert load(tier, SMALL, make_key(1)) == content_of(SMALL, make_page(SMALL, "a"))


def fill_inodes(store: Path) -> list[Path]:
    files: list[Path] = []
    try:
        while True:
            files.append(store / f"filler {len(files)}")
            files[-1].touch()
    except OSError:
        return files[:-1]


def write_page(tier: Tier, page: memoryview) -> None:
    """Without opening the namespace once more."""
    staged = tier.stage(SMALL, make_key(1), page, num_tokens=BLOCK_TOKENS)
    assert staged is not None
    tier.publish(staged)


@own_mounts
def test_a_new_backend_on_a_disk_that_was_full_is_made_once_there_is_room(tmp_path: Path) -> None:
    """And not at the next start only."""
    store, page = tmp_path / "store", make_page(SMALL, "a")
    mount_tmpfs(store, size_bytes=20 * MIB, max_inodes=32)
    fillers = fill_inodes(store)
    tier = PosixTier([str(store)])
    for act in (
        lambda: tier.open_namespace(SMALL),
        lambda: write_page(tier, page),
    ):
        with pytest.raises(TierError, match="No space left on device") as raised:
            act()
        assert raised.value.reason == "full"

    for each in fillers:
        each.unlink()

    write_page(tier, page)
    assert load(PosixTier([str(store)]), SMALL, make_key(1)) == content_of(SMALL, page)


@own_mounts
def test_what_has_taken_the_place_of_a_full_disk_is_not_made_a_backend(tmp_path: Path) -> None:
    store = tmp_path / "store"
    mount_tmpfs(store, size_bytes=20 * MIB, max_inodes=32)
    fill_inodes(store)
    tier = PosixTier([str(store)])
    with pytest.raises(TierError):
        tier.open_namespace(SMALL)
    unmount(store)

    with pytest.raises(TierError, match="has no id, so it may be a mount point"):
        write_page(tier, make_page(SMALL, "a"))
    assert list(store.iterdir()) == []
