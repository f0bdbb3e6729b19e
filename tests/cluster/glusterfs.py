"""GlusterFS, replica 2, on this machine. Daemon, bricks and clients have a network of their own: it
refuses 127.0.0.1. Its folders of state vanish with the mount namespace of the server.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from tests.cluster.nodes import Cluster, Fault, Mounted, Node
from tests.cluster.sshfs import agent

_ADDRESS, _VOLUME = "10.77.0.1", "kv"
_STATE = ("/run", "/var/lib/glusterd", "/var/log/glusterfs")
_BRICKS = ("brick1", "brick2")


@contextmanager
def cluster() -> Iterator[Cluster]:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ucm-cluster-"))
        server = stack.enter_context(agent("server", ("unshare", "--net")))
        _begin(server, folder)
        stack.callback(_end, server)
        inside = ("nsenter", f"--net=/proc/{server.run('echo $PPID').strip()}/ns/net")
        mounted = []
        for name in ("A", "B"):
            node = stack.enter_context(agent(name, inside))
            path, log = f"{folder}/{name}", f"{folder}/log-{name}"
            os.mkdir(path)
            mount = f"glusterfs --volfile-server={_ADDRESS} --volfile-id={_VOLUME} -l {log} {path}"
            unmount = partial(node.run, f"umount -l {path}")
            mounted.append(Mounted(node, path, partial(node.run, mount), unmount, folder))
            mounted[-1].mount()
            stack.callback(unmount)
        start = partial(_start_bricks, server)
        faults = {
            "brick": Fault(partial(_kill, server, _BRICKS[:1]), start),
            "both bricks": Fault(partial(_kill, server, _BRICKS), start),
        }
        yield Cluster("glusterfs", *mounted, faults)


def _begin(server: Node, folder: str) -> None:
    for state in _STATE:
        server.run(f"mkdir -p {state} && mount -t tmpfs tmpfs {state}")
    server.run(f"ip link set lo up && ip addr add {_ADDRESS}/32 dev lo && mkdir -p /run/gluster")
    server.run("glusterd -p /run/glusterd.pid")
    bricks = " ".join(f"{_ADDRESS}:{folder}/{brick}" for brick in _BRICKS)
    _gluster(server, f"volume create {_VOLUME} replica 2 {bricks} force")
    _gluster(server, f"volume set {_VOLUME} network.ping-timeout 5")
    _gluster(server, f"volume start {_VOLUME}")


def _gluster(server: Node, what: str) -> None:
    """The daemon answers a while after it has started."""
    command = f"gluster --mode=script {what}"
    server.run(f"for i in 1 2 3 4 5 6 7 8; do {command} && exit; sleep 1; done; exit 1")


def _kill(server: Node, bricks: Sequence[str]) -> None:
    for brick in bricks:
        server.run(f"kill -9 $(cat /run/gluster/vols/{_VOLUME}/*-{brick}.pid)")


def _start_bricks(server: Node) -> None:
    """Until they run: the daemon does not start one whose end it has not noticed."""
    start = f"gluster --mode=script volume start {_VOLUME} force"
    online = f"gluster volume status {_VOLUME} detail | grep -c 'Online *: Y'"
    all_run = f"[ $({online}) = {len(_BRICKS)} ]"
    server.run(f"for i in 1 2 3 4 5 6 7 8; do {start}; sleep 1; {all_run} && exit; done; exit 1")


def _end(server: Node) -> None:
    """What it has started, and nothing else, has this network."""
    pids = server.run("for p in /proc/[0-9]*; do echo $p $(readlink $p/ns/net); done").splitlines()
    own = server.run("readlink /proc/self/ns/net").strip()
    for line in pids:
        path, _, net = line.partition(" ")
        comm = Path(path) / "comm"
        if net == own and comm.exists() and comm.read_text().startswith("gluster"):
            os.kill(int(Path(path).name), signal.SIGKILL)
