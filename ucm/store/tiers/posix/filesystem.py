"""Which filesystem a directory lies on, and what may be expected of it. Linux.

Read from the kernel, by the directory's device where that names one mount's filesystem,
and else by the longest mount point above it (btrfs and overlay give files devices of their own).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

_MOUNTINFO = "/proc/thread-self/mountinfo"
# One kernel has them, so nobody else can change them behind its back.
_LOCAL = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "ramfs")
) | frozenset(("overlay", "rootfs", "vfat", "exfat", "jfs", "reiserfs", "ntfs3", "squashfs"))
# Each client is told by a server what others change, absences included.
_TOLD = frozenset(("ceph", "fuse.ceph", "fuse.ceph-fuse"))
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class Mount:
    """One line of the mount table. `device` as in st_dev; `kind` is "nfs4", "fuse.sshfs", ...;
    `options` are those of the mount and of its filesystem."""

    point: str
    kind: str
    device: int
    options: frozenset[str] = frozenset()

    @property
    def is_local(self) -> bool:
        """Only this machine can change it, so what this machine remembers of it is true."""
        return self.kind in _LOCAL

    @property
    def is_told(self) -> bool:
        """What this machine remembers of it is true, also where others change it."""
        return self.kind in _TOLD

    @property
    def believes_times(self) -> bool:
        """It believes in what it remembers of a directory as long as that has its time of change,
        which may be the same before and after a change (revalidate.py)."""
        return self.kind.startswith("nfs")


class SeenThrough:
    """The mount that a directory is seen through. Looked up anew when its device is another one:
    the mount may be another one later."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._known: tuple[int, Mount | None] | None = None

    def remembers_absences(self) -> bool:
        """Whether this machine may take a name for missing that another one has made since."""
        is_there, mount = self._look()
        return is_there and (mount is None or not (mount.is_local or mount.is_told))

    def is_told(self) -> bool:
        _, mount = self._look()
        return mount is not None and mount.is_told

    def believes_times(self) -> bool:
        _, mount = self._look()
        return mount is not None and mount.believes_times

    def _look(self) -> tuple[bool, Mount | None]:
        """Whether there is anything, and its mount as far as the mount table can tell."""
        try:
            device = os.stat(self._path).st_dev
            if self._known is None or self._known[0] != device:
                self._known = device, mount_of(self._path)
        except OSError:
            return False, None
        return True, self._known[1]


def mount_of(path: str) -> Mount | None:
    """Of what lies at `path` now. None where the mount table can't tell. Raises OSError if nothing
    is there."""
    path = os.path.realpath(path)
    device = os.stat(path).st_dev
    try:
        with open(_MOUNTINFO, encoding="utf-8", errors="surrogateescape") as file:
            return choose(parse(file), path, device)
    except OSError:
        return None


def parse(lines: Iterable[str]) -> list[Mount]:
    """The mount table, in its order: a later mount hides an earlier one of the same place."""
    mounts = []
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 6 or not kinds:
            continue
        major, _, minor = fields[2].partition(":")
        point = _OCTAL.sub(lambda found: chr(int(found[1], 8)), fields[4])
        options = frozenset(",".join((fields[5], *kinds[2:3])).split(","))
        mounts.append(Mount(point, kinds[0], os.makedev(int(major), int(minor)), options))
    return mounts


def choose(mounts: Iterable[Mount], path: str, device: int) -> Mount | None:
    """The mount that `path`, absolute and without links, is seen through."""
    above = [mount for mount in mounts if _is_below(path, mount.point)]
    found = [mount for mount in above if mount.device == device] or above
    # Of equally long ones the last: it was mounted over the others.
    return max(reversed(found), key=lambda mount: len(mount.point), default=None)


def _is_below(path: str, point: str) -> bool:
    return path == point or path.startswith(point.rstrip("/") + "/")
