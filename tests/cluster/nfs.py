"""A Linux NFS server and two clients of it, in user-mode-linux: no module, no KVM, no privilege of
this machine's kernel but to be root for packages. One boot serves every version and option.
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
OPTIONS = {
    "nfs-4.2": "vers=4.2",
    "nfs-4.2-positive": "vers=4.2,lookupcache=positive",
    "nfs-3": "vers=3,nolock",
    "nfs-3-positive": "vers=3,nolock,lookupcache=positive",
}
FAULTS = ("link of A", "server", "full")
_MODULES = Path("/usr/lib/uml/modules")


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
    a, b = _mounted(machine, "a", name), _mounted(machine, "b", name)
    a.mount()
    b.mount()
    server = machine.server
    full = "/mnt/export/full"
    faults = {
        "link of A": Fault(
            partial(server.run, "ip link set vA down"), partial(server.run, "ip link set vA up")
        ),
        "server": Fault(partial(server.run, "rpc.nfsd 0"), partial(server.run, "rpc.nfsd 8")),
        "full": Fault(
            partial(server.run, f"dd if=/dev/zero of={full} bs=1M 2>/dev/null || true"),
            partial(server.run, f"rm -f {full}"),
        ),
    }
    try:
        yield Cluster(name, a, b, faults)
    finally:
        for each in (a, b):
            each.node.settle()
            each.unmount()


def _mounted(machine: Machine, node: str, name: str) -> Mounted:
    agent = machine.a if node == "a" else machine.b
    path, options = f"/mnt/{agent.name}", OPTIONS[name]
    exported = "/mnt/export" if options.startswith("vers=3") else "/"
    address = "10.77.1.1" if node == "a" else "10.77.2.1"
    mount = f"mount -t nfs -o {options} {address}:{exported} {path}"
    return Mounted(
        agent,
        path,
        partial(agent.run, mount),
        partial(agent.run, f"umount -l {path}"),
        "/run/tmp",
    )
