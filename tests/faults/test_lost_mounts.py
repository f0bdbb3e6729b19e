"""A mount that is not there (yet, or any more) is not filled on the disk below it."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.fuse import mount_fuse, needs_fuse
from tests.faults.mounts import mount_again, mount_tmpfs, own_mounts, take_away, unmount
from tests.store.tiers.tier_contract import (
    BLOCK_TOKENS,
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
from ucm.store.tiers.tier import ReadStatus

KEYS = [make_key(i) for i in range(4)]
PAGE = make_page(SMALL, "a")
SIZE_BYTES = 32 << 20


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def mounted(tmp_path: Path) -> tuple[Path, Path, PosixTier]:
    """A store that is mounted at `store`, and kept alive at `server` when it is not."""
    server, store = tmp_path / "server", tmp_path / "store"
    mount_tmpfs(server, size_bytes=SIZE_BYTES)
    mount_again(server, store)
    tier = PosixTier([str(store)])
    tier.open_namespace(SMALL)
    return server, store, tier


@own_mounts
def test_nothing_is_written_where_the_mount_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, store, tier = mounted(tmp_path)
    assert dump(tier, SMALL, KEYS[0], PAGE)
    unmount(store)

    for key in KEYS[1:]:
        with pytest.raises(TierError, match="not the storage backend"):
            tier.stage(SMALL, key, PAGE, num_tokens=BLOCK_TOKENS)
    with pytest.raises(TierError, match="not the storage backend"):
        tier.open_namespace(SMALL)
    with pytest.raises(TierError, match="not the storage backend"):
        tier.holds(SMALL, KEYS[0])

    assert tier.contains(SMALL, KEYS) == 0
    assert not tier.contains_now(SMALL, KEYS[0])
    assert load(tier, SMALL, KEYS[0]) is ReadStatus.ABSENT
    assert files_below(store) == []
    said = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(said) == 1 and str(store) in said[0].getMessage()


@own_mounts
def test_what_lies_below_a_lost_mount_is_not_found(tmp_path: Path) -> None:
    """Left by somebody who took the directory for the store: another store of the same pages."""
    _, store, tier = mounted(tmp_path)
    unmount(store)
    other = PosixTier([str(store)])
    dump(other, SMALL, KEYS[0], PAGE)

    assert tier.contains(SMALL, KEYS[:1]) == 0
    assert load(tier, SMALL, KEYS[0]) is ReadStatus.ABSENT
    assert load(other, SMALL, KEYS[0]) == content_of(SMALL, PAGE)


@own_mounts
def test_a_page_that_was_staged_before_the_mount_went_is_not_published(tmp_path: Path) -> None:
    server, store, tier = mounted(tmp_path)
    staged = tier.stage(SMALL, KEYS[0], PAGE, num_tokens=BLOCK_TOKENS)
    assert staged is not None
    unmount(store)

    with pytest.raises(TierError):
        tier.publish(staged)

    assert files_below(store) == []
    assert not [name for name in files_below(server) if name.endswith(".kv")]


@own_mounts
@needs_fuse
@pytest.mark.parametrize("is_new", [False, True])
def test_a_mount_that_goes_away_in_the_middle_of_a_write_leaves_nothing_below(
    tmp_path: Path, is_new: bool
) -> None:
    """After the backend was found to be there, and before a directory or a file is made in it."""
    store = tmp_path / "store"
    with (
        # What is there is not looked up again, so what hangs is the name of the page.
        mount_fuse(tmp_path / "server", store, entry_timeout_s=60.0) as mount,
        ThreadPoolExecutor(1) as thread,
    ):
        tier = PosixTier([str(store)])
        tier.open_namespace(SMALL)
        dump(tier, SMALL, KEYS[0], PAGE)
        mount.hang("lookup")
        num_lookups = mount.calls["lookup"]
        beside = KEYS[1] if is_new else Key(KEYS[0][:-1] + bytes([KEYS[0][-1] ^ 1]))
        staging = thread.submit(tier.stage, SMALL, beside, PAGE, num_tokens=BLOCK_TOKENS)
        deadline_s = time.monotonic() + 30
        while mount.calls["lookup"] == num_lookups:
            assert not staging.done() and time.monotonic() < deadline_s
            time.sleep(0.01)
        take_away(store)
        mount.release()

        with pytest.raises(TierError):
            staging.result(timeout=30)
        assert files_below(store) == []


@own_mounts
def test_a_mount_that_comes_back_is_used_again(tmp_path: Path) -> None:
    """Also as another device, as network filesystems come back, and emptied but for its id."""
    server, store, tier = mounted(tmp_path)
    dump(tier, SMALL, KEYS[0], PAGE)
    unmount(store)
    assert tier.contains(SMALL, KEYS[:1]) == 0
    mount_again(server, store)

    assert load(tier, SMALL, KEYS[0]) == content_of(SMALL, PAGE)
    assert dump(tier, SMALL, KEYS[1], PAGE)
    unmount(store)
    other = tmp_path / "moved"
    mount_tmpfs(other, size_bytes=SIZE_BYTES)
    shutil.copy(server / paths.BACKEND_ID, other)
    mount_again(other, store)

    assert tier.contains(SMALL, KEYS[:1]) == 0
    assert dump(tier, SMALL, KEYS[2], PAGE)
    assert (other / SMALL.fingerprint.hex() / paths.MANIFEST).exists()


@own_mounts
def test_a_mount_that_comes_late_is_used_when_it_comes(tmp_path: Path) -> None:
    server, store = tmp_path / "server", tmp_path / "mnt" / "store"
    mount_tmpfs(server, size_bytes=SIZE_BYTES)
    PosixTier([str(server / "store")]).open_namespace(SMALL)
    tier = PosixTier([str(store)])
    with pytest.raises(TierError, match="mount or make it"):
        tier.open_namespace(SMALL)
    with pytest.raises(TierError, match="has no id"):
        tier.stage(SMALL, KEYS[0], PAGE, num_tokens=BLOCK_TOKENS)

    mount_again(server, tmp_path / "mnt")

    assert dump(tier, SMALL, KEYS[0], PAGE)
    assert load(tier, SMALL, KEYS[0]) == content_of(SMALL, PAGE)


@own_mounts
def test_another_filesystem_at_the_same_place_is_not_used(tmp_path: Path) -> None:
    _, store, tier = mounted(tmp_path)
    other = tmp_path / "other"
    mount_tmpfs(other, size_bytes=SIZE_BYTES)
    PosixTier([str(other)]).open_namespace(SMALL)
    before = files_below(other)
    mount_again(other, store)

    with pytest.raises(TierError, match="the id there is"):
        tier.stage(SMALL, KEYS[0], PAGE, num_tokens=BLOCK_TOKENS)
    assert files_below(other) == before


@own_mounts
def test_of_several_backends_the_lost_one_is_not_filled(tmp_path: Path) -> None:
    stores = [tmp_path / "first", tmp_path / "second"]
    for store in stores:
        mount_tmpfs(store, size_bytes=SIZE_BYTES)
    tier = PosixTier([str(store) for store in stores])
    tier.open_namespace(SMALL)
    unmount(stores[0])
    results = []
    for i in range(16):
        try:
            staged = tier.stage(SMALL, make_key(i), PAGE, num_tokens=BLOCK_TOKENS)
        except TierError:
            results.append(False)
            continue
        assert staged is not None
        tier.publish(staged)
        results.append(load(tier, SMALL, make_key(i)) == content_of(SMALL, PAGE))

    assert files_below(stores[0]) == []
    assert 0 < sum(results) < 16


def test_ids_are_made_by_init_and_by_who_opens_and_by_nobody_else(tmp_path: Path) -> None:
    store = tmp_path / "store"
    tier = PosixTier([str(store)])
    with pytest.raises(TierError, match="ucm init"):
        tier.stage(SMALL, KEYS[0], PAGE, num_tokens=BLOCK_TOKENS)
    assert tier.contains(SMALL, KEYS) == 0
    assert not store.exists()

    made, again = ucm_init(str(store)), ucm_init(str(store))

    assert (made.returncode, again.returncode) == (0, 0)
    assert made.stdout.split()[-1] == again.stdout.split()[-1]
    staged = tier.stage(SMALL, KEYS[0], PAGE, num_tokens=BLOCK_TOKENS)
    assert staged is not None
    tier.publish(staged)


def test_a_store_that_was_emptied_gets_its_id_back_by_init(tmp_path: Path) -> None:
    tier = PosixTier([str(tmp_path / "store")])
    dump(tier, SMALL, KEYS[0], PAGE)
    old_id = (tmp_path / "store" / paths.BACKEND_ID).read_text().strip()
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(TierError, match=f"ucm init --id {old_id}"):
        tier.stage(SMALL, KEYS[0], PAGE, num_tokens=BLOCK_TOKENS)

    assert ucm_init("--id", old_id, str(tmp_path / "store")).returncode == 0

    assert dump(tier, SMALL, KEYS[0], PAGE)


@pytest.mark.parametrize("args", [["missing/store"], ["dangling"], ["--id", "zz", "store"]])
def test_init_says_why_it_can_not(tmp_path: Path, args: list[str]) -> None:
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    done = ucm_init(*args[:-1], str(tmp_path / args[-1]))
    assert done.returncode == 1
    assert done.stderr.startswith("ucm init: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()


def test_a_store_that_begins_on_a_disk_of_this_machine_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, when it is made: it may be a mount that was forgotten."""
    for _ in range(2):
        PosixTier([str(tmp_path / "store")]).open_namespace(SMALL)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1 and "only this machine sees it" in said[0]
    assert said[0].endswith("remove it again, mount shared storage there, and begin anew")


def ucm_init(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ucm.cli.main", "init", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
