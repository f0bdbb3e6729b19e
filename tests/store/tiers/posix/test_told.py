"""On a filesystem whose clients are told of changes a name is just looked at: listings cost, and
clients of CephFS have died of two at once of one directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.store.node.support import FINGERPRINT, PAGE_BYTES, make_keys
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.tiers.posix import filesystem, paths
from ucm.store.tiers.posix.filesystem import Mount
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import TierNamespace

NAMESPACE = TierNamespace(FINGERPRINT, PAGE_BYTES, b"{}")


@pytest.mark.parametrize(("kind", "is_listed"), [("fuse.ceph-fuse", False), ("nfs4", True)])
def test_a_name_is_asked_past_what_is_remembered_only_where_nobody_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, is_listed: bool
) -> None:
    monkeypatch.setattr(filesystem, "mount_of", lambda path: Mount(str(path), kind, 0))
    tier, (here, missing) = PosixTier([str(tmp_path)]), make_keys("told", 2)
    tier.open_namespace(NAMESPACE)
    page = memoryview(bytearray(padded_bytes(PAGE_BYTES)))
    staged = tier.stage(NAMESPACE, here, page, num_tokens=128)
    assert staged is not None
    tier.publish(staged)
    folder = Path(paths.block_path(str(tmp_path), FINGERPRINT, here)).parent
    os.utime(folder, (1, 1))

    listed: list[object] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    assert tier.contains(NAMESPACE, [here, missing]) == 1
    assert tier.contains_now(NAMESPACE, here)
    assert not tier.contains_now(NAMESPACE, missing)
    assert bool(listed) is is_listed
    tier.doubt(NAMESPACE, here)
    assert (folder.stat().st_mtime > 1) is is_listed
