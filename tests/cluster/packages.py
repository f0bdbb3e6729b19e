"""What a cluster needs of Debian, and whether it is here."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
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


def install_line(packages: Iterable[str]) -> str:
    return f"apt-get install -y --no-install-recommends {' '.join(packages)}"


def install(packages: Iterable[str]) -> None:
    """Where that fails, filesystems are skipped, and say what is missing."""
    for command in ("apt-get update -qq", install_line(packages)):
        subprocess.run(command.split(), check=False, stdin=subprocess.DEVNULL)
