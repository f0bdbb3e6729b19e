"""A Linux NFS server, one of NFS-ganesha, and two clients of them, in user-mode-linux: no module,
no KVM, no privilege of this machine's kernel but to be root for packages. One boot serves every
server, version and option.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.cluster.nodes import Cluster, Fault, Mounted, Node

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "cluster"
DISK_MB = 600
_MODULES = Path("/usr/lib/uml/modules")
_GANESHA_PID = "/run/ganesha/pid"


@dataclass(frozen=True)
class Kind:
    """`path` is how clients call what the server exports. Its `start` does nothing if it runs."""

    options: str
    path: str = "/"
    start: str = "rpc.nfsd 8"
    stop: str = "rpc.nfsd 0"


KINDS = {
    "nfs-4.2": Kind("vers=4.2"),
    "nfs-4.2-positive": Kind("vers=4.2,lookupcache=positive"),
    "nfs-3": Kind("vers=3,nolock", "/mnt/export"),
    "nfs-3-positive": Kind("vers=3,nolock,lookupcache=positive", "/mnt/export"),
    "nfs-ganesha": Kind(
        "vers=4.2,port=12049",
        "/ganesha",
        f"kill -0 $(cat {_GANESHA_PID}) 2>/dev/null || ganesha.nfsd -L {CACHE}/log-ganesha "
        f"-f {ROOT}/tests/cluster/ganesha.conf -p {_GANESHA_PID}",
        f"kill -9 $(cat {_GANESHA_PID})",
    ),
}
# Ganesha goes on with the directory that it has opened, whatever is mounted there.
_OF_KERNEL = ("export",)
FAULTS = {
    name: ("link of A", "server", "full") + _OF_KERNEL * (name != "nfs-ganesha") for name in KINDS
}


@dataclass
class Machine:
    a: Node
    b: Node
    server: Node


@contextmanager
def booted() -> Iterator[Machine]:
    """Up in about five seconds; gone with the context, whatever is mounted or hangs in it."""
    _make_modules()
    disk = _make_disk()
    nodes, ours, theirs = [], [], []
    consoles = []
    for number, name in enumerate(("A", "B", "server"), 1):
        questions, answers = os.pipe(), os.pipe()
        theirs += [questions[0], answers[1]]
        ours += [questions[1], answers[0]]
        consoles.append(f"con{number}=fd:{questions[0]},fd:{answers[1]}")
        nodes.append(Node(name, questions[1], answers[0]))
    command = [
        *("linux.uml", "mem=1500M", f"ubda={disk}", "rootfstype=hostfs", "rootflags=/", "rw"),
        *(f"init={ROOT}/tests/cluster/nfs-init.sh", "con=null", "con0=null,fd:1", *consoles),
        *("quiet", f"PYTHON={sys.executable}", f"CHECKOUT={ROOT}", f"CACHE={CACHE}"),
    ]
    with (
        (CACHE / "log-kernel").open("wb") as log,
        subprocess.Popen(
            command,
            pass_fds=theirs,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        ) as process,
    ):
        for fd in theirs:
            os.close(fd)
        try:
            for node in nodes:
                node.wait_ready()
            yield Machine(*nodes)
        finally:
            # Its processes are threads of one group, and a hard mount would not let it halt.
            os.killpg(process.pid, signal.SIGKILL)
            for node in nodes:
                node.close()


def _make_modules() -> None:
    """Where modprobe of the guest finds them, without a word to this machine's own modules."""
    for source in _MODULES.iterdir():
        target = CACHE / "um" / "lib" / "modules" / source.name
        target.mkdir(parents=True, exist_ok=True)
        for name in ("kernel", "modules.order", "modules.builtin", "modules.builtin.modinfo"):
            link = target / name
            if not link.is_symlink():
                link.symlink_to(source / name)
        if not (target / "modules.dep").exists():
            subprocess.run(["/sbin/depmod", "-b", CACHE / "um", source.name], check=True)


def _make_disk() -> Path:
    disk = CACHE / "disk.img"
    disk.unlink(missing_ok=True)
    with disk.open("wb") as file:
        file.truncate(DISK_MB << 20)
    mkfs = shutil.which("mkfs.ext4") or "/sbin/mkfs.ext4"
    subprocess.run([mkfs, "-q", "-F", disk], check=True)
    return disk


@contextmanager
def cluster(machine: Machine, name: str) -> Iterator[Cluster]:
    kind, server = KINDS[name], machine.server
    full = "/mnt/export/full"
    faults = {
        "link of A": Fault(
            partial(server.run, "ip link set vA down"), partial(server.run, "ip link set vA up")
        ),
        "server": Fault(partial(server.run, kind.stop), partial(server.run, kind.start)),
        # Another directory in its place: what is open is stale, what is looked for is absent.
        "export": Fault(
            partial(server.run, "mount -t tmpfs tmpfs /mnt/export && exportfs -f"),
            partial(server.run, "umount -l /mnt/export && exportfs -f"),
        ),
        "full": Fault(
            partial(server.run, f"dd if=/dev/zero of={full} bs=1M 2>/dev/null || true"),
            partial(server.run, f"rm -f {full}"),
        ),
    }
    server.run(kind.start)
    a = _mounted(machine.a, kind, "10.77.1.1")
    b = _mounted(machine.b, kind, "10.77.2.1")
    a.mount()
    b.mount()
    try:
        yield Cluster(name, a, b, {fault: faults[fault] for fault in FAULTS[name]})
    finally:
        for each in (a, b):
            each.node.settle()
            each.unmount()


def _mounted(node: Node, kind: Kind, server: str) -> Mounted:
    path = f"/mnt/{node.name}"
    mount = f"mount -t nfs -o {kind.options} {server}:{kind.path} {path}"
    unmount = f"umount -l {path}"
    return Mounted(node, path, partial(node.run, mount), partial(node.run, unmount), "/run/tmp")
