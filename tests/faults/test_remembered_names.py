"""A tier on a mount that remembers for a while which names were missing, as NFS clients do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.fuse import FuseMount, mount_fuse, needs_fuse
from tests.store.node.support import FINGERPRINT, PAGE_BYTES, content, make_keys
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import ReadStatus, TierNamespace

pytestmark = [pytest.mark.process, needs_fuse]

NAMESPACE = TierNamespace(FINGERPRINT, PAGE_BYTES, b"{}")
REMEMBERS_S = 30.0
FOREVER_S = 3600.0


def store(tier: PosixTier, key) -> None:
    tier.open_namespace(NAMESPACE)
    page = memoryview(bytearray(padded_bytes(PAGE_BYTES)))
    page[:PAGE_BYTES] = content(key)
    staged = tier.stage(NAMESPACE, key, page, num_tokens=128)
    assert staged is not None
    tier.publish(staged)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


def mounted(folder: Path, tmp_path: Path, **memory):
    memory = memory or {"negative_timeout_s": REMEMBERS_S}
    return mount_fuse(folder, tmp_path / "mounted", **memory)


def test_a_page_that_another_node_stores_is_seen_at_once_by_who_was_promised_it(
    folder: Path, tmp_path: Path
) -> None:
    there, (key, other) = PosixTier([str(folder)]), make_keys("late", 2)
    with mounted(folder, tmp_path) as mount:
        here = PosixTier([str(mount.path)])
        assert not here.contains_now(NAMESPACE, key)
        store(there, key)
        assert here.contains_now(NAMESPACE, key)
        assert not here.contains_now(NAMESPACE, other)
        page = memoryview(bytearray(padded_bytes(PAGE_BYTES)))
        assert here.read(NAMESPACE, key, page).status is ReadStatus.HIT
        assert page[:PAGE_BYTES] == content(key)


def test_even_if_it_was_looked_for_before_in_the_ordinary_way(folder: Path, tmp_path: Path) -> None:
    """Which the mount remembers, of the page and of the folders that it will be in."""
    there, (key,) = PosixTier([str(folder)]), make_keys("early", 1)
    with mounted(folder, tmp_path) as mount:
        here = PosixTier([str(mount.path)])
        path = Path(paths.block_path(str(mount.path), FINGERPRINT, key))
        assert here.contains(NAMESPACE, [key]) == 0
        store(there, key)
        assert not path.exists(), "the mount remembers nothing: no test"
        assert here.contains_now(NAMESPACE, key)
        assert path.exists()


def test_an_ordinary_lookup_is_not_blind_for_what_came_after_a_miss(
    folder: Path, tmp_path: Path
) -> None:
    """Of a whole prompt that somebody else has stored since, as after a prefill elsewhere."""
    there, keys = PosixTier([str(folder)]), make_keys("prompt", 5)
    with mounted(folder, tmp_path) as mount:
        here = PosixTier([str(mount.path)])
        for key in keys:
            assert here.contains(NAMESPACE, [key]) == 0
        for key in keys[:4]:
            store(there, key)
        assert not Path(paths.block_path(str(mount.path), FINGERPRINT, keys[0])).exists()
        assert here.contains(NAMESPACE, keys) == 4


def test_a_page_is_seen_at_once_also_where_listings_are_remembered(
    folder: Path, tmp_path: Path
) -> None:
    there, (key,) = PosixTier([str(folder)]), make_keys("listed", 1)
    there.open_namespace(NAMESPACE)
    path = Path(paths.block_path(str(folder), FINGERPRINT, key))
    path.parent.mkdir(parents=True)
    with mounted(folder, tmp_path, listing_timeout_s=FOREVER_S) as mount:
        here = PosixTier([str(mount.path)])
        directory = Path(paths.block_path(str(mount.path), FINGERPRINT, key)).parent
        assert os.listdir(directory) == []
        assert not here.contains_now(NAMESPACE, key)
        store(there, key)
        assert os.listdir(directory) == [], "the mount remembers no listing: no test"
        assert here.contains_now(NAMESPACE, key)


def as_if_in_the_tick_of_the_look(folder: Path, before: dict[Path, int]) -> None:
    """Gives every directory the time of change that it had `before` another node wrote in it. One
    that is new was looked for in its parent."""
    for path, mtime_ns in before.items():
        os.utime(path, ns=(mtime_ns, mtime_ns))


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")] if path.is_dir()}


@pytest.mark.parametrize("made_before", [0, 1, 2, 3], ids=lambda count: f"{count} directories")
def test_a_page_that_came_in_the_tick_of_a_look_is_seen_once_its_absence_is_doubted(
    folder: Path, tmp_path: Path, made_before: int
) -> None:
    """However many of its directories were there when it was looked for."""
    there, (key,) = PosixTier([str(folder)]), make_keys("tick", 1)
    there.open_namespace(NAMESPACE)
    path = Path(paths.block_path(str(folder), FINGERPRINT, key))
    for directory in [path.parents[2], path.parents[1], path.parents[0]][:made_before]:
        directory.mkdir(exist_ok=True)
    with mounted(folder, tmp_path, believes_until_changed=True) as mount:
        here = PosixTier([str(mount.path)])
        assert not here.contains_now(NAMESPACE, key)
        before = times(folder)
        store(there, key)
        as_if_in_the_tick_of_the_look(folder, before)
        assert not here.contains_now(NAMESPACE, key), "the mount is not blind: no test"
        here.doubt(NAMESPACE, key)
        assert here.contains_now(NAMESPACE, key)


def test_a_doubt_makes_nothing_and_raises_nothing(folder: Path, tmp_path: Path) -> None:
    """Also where there is nothing to doubt, or no right to."""
    (key,) = make_keys("nothing", 1)
    PosixTier([str(folder)]).doubt(NAMESPACE, key)
    PosixTier([str(tmp_path / "missing")]).doubt(NAMESPACE, key)
    assert list(folder.iterdir()) == []
    assert not (tmp_path / "missing").exists()


def test_a_look_in_vain_makes_nothing(folder: Path, tmp_path: Path) -> None:
    there, keys = PosixTier([str(folder)]), make_keys("vain", 2)
    store(there, keys[0])
    before = sorted(folder.rglob("*"))
    with mounted(folder, tmp_path) as mount:
        here = PosixTier([str(mount.path)])
        assert not here.contains_now(NAMESPACE, keys[1])
        assert made(mount) == {}
    assert sorted(folder.rglob("*")) == before


def made(mount: FuseMount) -> dict[str, int]:
    changing = ("create", "mkdir", "link", "rename", "unlink", "rmdir", "write")
    return {name: mount.calls[name] for name in changing if mount.calls[name]}
