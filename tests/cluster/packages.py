"""What clusters need of Debian and of Python's packages, and whether it is here."""

from __future__ import annotations

import glob
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from examples.cluster.seaweedfs import weed_binary

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Of the repository's folder, where tests run.
_PIP_LINE = "-m pip install --disable-pip-version-check --no-deps -r requirements/cluster.txt"
_INSTALL_S = 300.0
_BINARIES = {
    "linux.uml": "user-mode-linux",
    "rpc.nfsd": "nfs-kernel-server",
    "mount.nfs": "nfs-common",
    "rpcbind": "rpcbind",
    "ip": "iproute2",
    "modprobe": "kmod",
    "mkfs.ext4": "e2fsprogs",
    "ganesha.nfsd": "nfs-ganesha",
    "/usr/lib/*/ganesha/libfsalvfs.so": "nfs-ganesha-vfs",
    "sshfs": "sshfs",
    "/usr/lib/openssh/sftp-server": "openssh-sftp-server",
    "glusterd": "glusterfs-server",
    "glusterfs": "glusterfs-client",
    "setfattr": "attr",
    "redis-server": "redis-server",
    "curl": "curl",
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "ceph-mds": "ceph-mds",
    "ceph-fuse": "ceph-fuse",
    "ceph": "ceph-common",
}
_NFS = ("linux.uml", "rpc.nfsd", "mount.nfs", "rpcbind", "ip", "modprobe", "mkfs.ext4")
OF = {
    "nfs": _NFS,
    "nfs-ganesha": (*_NFS, "ganesha.nfsd", "/usr/lib/*/ganesha/libfsalvfs.so"),
    "sshfs": ("sshfs", "/usr/lib/openssh/sftp-server"),
    "glusterfs": ("glusterd", "glusterfs", "setfattr", "ip"),
    "cephfs": ("ceph-mon", "ceph-osd", "ceph-mds", "ceph-fuse", "ceph", "ip"),
    "juicefs": ("redis-server", "ip"),
    "seaweedfs": ("curl", "ip"),
}


def juicefs_binary() -> str | None:
    """None: it is not installed (requirements/cluster.txt)."""
    beside = Path(sys.executable).with_name("juicefs")
    return str(beside) if beside.exists() else shutil.which("juicefs")


def _lacks_python_package(filesystem: str) -> bool:
    of_python = {"juicefs": juicefs_binary, "seaweedfs": weed_binary}
    return filesystem in of_python and of_python[filesystem]() is None


def is_usable(filesystem: str) -> bool:
    """Whether a cluster of it can be made here."""
    return not _lacks_python_package(filesystem) and not missing([filesystem])


def _is_here(binary: str) -> bool:
    if "/" in binary:
        return bool(glob.glob(binary))
    return shutil.which(binary, path=_PATH) is not None


def missing(filesystems: Iterable[str] = OF) -> list[str]:
    """The packages."""
    binaries = [binary for each in filesystems for binary in OF[each]]
    return sorted({_BINARIES[binary] for binary in binaries if not _is_here(binary)})


def install_lines(filesystems: Collection[str] = OF) -> list[str]:
    """What installs all of theirs that is missing; none: nothing is."""
    debian = missing(filesystems)
    lines = [install_line(debian)] if debian else []
    if any(_lacks_python_package(each) for each in filesystems):
        lines.append(f"{sys.executable} {_PIP_LINE}")
    return lines


def install_line(packages: Iterable[str]) -> str:
    return f"apt-get install -y --no-install-recommends {' '.join(packages)}"


def install(filesystems: Collection[str] = OF) -> None:
    """Where that fails, filesystems are skipped, and say what is missing."""
    lines = install_lines(filesystems)
    if missing(filesystems):
        lines.insert(0, "apt-get update -qq")
    with suppress(OSError, subprocess.TimeoutExpired):
        for command in lines:
            subprocess.run(
                command.split(), check=False, stdin=subprocess.DEVNULL, timeout=_INSTALL_S
            )
