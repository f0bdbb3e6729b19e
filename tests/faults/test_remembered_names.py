"""A tier on a mount that remembers for a while which names were missing, as NFS clients do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.fuse import FuseMount, mount_fuse, needs_fuse
from tests.store.node.support import FINGERPRINT, PAGE_BYTES, content, make_keys
from ucm.store.page import padded_bytes
from ucm.store.posix import PosixTier
from ucm.store.tier import ReadStatus, TierNamespace

pytestmark = [pytest.mark.process, needs_fuse]

NAMESPACE = TierNamespace(FINGERPRINT, PAGE_BYTES, b"{}")
REMEMBERS_S = 30.0


def store(tier: PosixTier, key) -> None:
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


def mounted(folder: Path, tmp_path: Path):
    return mount_fuse(folder, tmp_path / "mounted", negative_timeout_s=REMEMBERS_S)


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
        assert here.contains(NAMESPACE, [key]) == 0
        store(there, key)
        assert here.contains(NAMESPACE, [key]) == 0, "the mount remembers nothing: no test"
        assert here.contains_now(NAMESPACE, key)
        assert here.contains(NAMESPACE, [key]) == 1


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
