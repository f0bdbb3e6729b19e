"""The mount table, and what it says of a directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.fuse import mount_fuse, needs_fuse
from tests.faults.mounts import mount_tmpfs, own_mounts
from ucm.store.tiers.posix.filesystem import Mount, choose, mount_of, parse

TABLE = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /mnt/kv\\040one rw - nfs4 server:/kv rw,vers=4.2
31 22 0:41 / /mnt/kv rw shared:7 master:2 - fuse.sshfs me@there: rw
32 31 254:16 /sub /mnt/kv rw - xfs /dev/vdb rw
33 22 0:50 / /home rw - btrfs /dev/vdc rw,subvol=/home
broken line
"""


def test_a_line_is_a_place_a_kind_and_a_device() -> None:
    """Blanks in names are octal; a line that is none is passed over."""
    mounts = parse(TABLE.splitlines())
    assert [mount.kind for mount in mounts] == ["ext4", "nfs4", "fuse.sshfs", "xfs", "btrfs"]
    options = frozenset(("rw", "vers=4.2"))
    assert mounts[1] == Mount("/mnt/kv one", "nfs4", os.makedev(0, 40), options)


@pytest.mark.parametrize(
    ("path", "device", "kind"),
    [
        ("/mnt/kv one/store", (0, 40), "nfs4"),
        ("/mnt/kv/store", (254, 16), "xfs"),  # mounted over the other
        ("/mnt/kvx", (254, 0), "ext4"),  # not below /mnt/kv
        ("/", (254, 0), "ext4"),
        ("/home/me", (0, 77), "btrfs"),  # a subvolume has a device of its own
    ],
)
def test_a_path_is_seen_through_the_mount_of_its_device_or_the_nearest_above(
    path: str, device: tuple[int, int], kind: str
) -> None:
    found = choose(parse(TABLE.splitlines()), path, os.makedev(*device))
    assert found is not None and found.kind == kind


@pytest.mark.parametrize(
    ("kind", "is_local"),
    [("ext4", True), ("tmpfs", True), ("overlay", True)]
    + [(kind, False) for kind in ("nfs", "nfs4", "cifs", "ceph", "lustre", "fuse.juicefs", "new")],
)
def test_what_is_not_known_to_be_of_this_machine_alone_is_shared(kind: str, is_local: bool) -> None:
    assert Mount("/", kind, 0).is_local is is_local


@pytest.mark.parametrize(
    ("kind", "is_told"),
    [("ceph", True), ("fuse.ceph-fuse", True), ("fuse.sshfs", False), ("nfs4", False)],
)
def test_only_what_is_known_to_be_told_of_changes_is_believed(kind: str, is_told: bool) -> None:
    assert Mount("/", kind, 0).is_told is is_told


@own_mounts
def test_a_mount_of_this_machine_is_found(tmp_path: Path) -> None:
    here = tmp_path / "here"
    mount_tmpfs(here, size_bytes=1 << 20)
    found = mount_of(str(here))
    assert found is not None and (found.point, found.kind) == (str(here), "tmpfs")


@pytest.mark.process
@needs_fuse
def test_a_fuse_mount_is_shared(tmp_path: Path) -> None:
    with mount_fuse(tmp_path / "source", tmp_path / "mounted") as mount:
        found = mount_of(str(mount.path))
        assert found is not None and not found.is_local


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        mount_of(str(tmp_path / "missing"))
