"""GlusterFS, replica 2. It refuses 127.0.0.1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from tests.cluster.nodes import Cluster, Fault, Node
from tests.cluster.spaces import Space, space

FAULTS = ("brick", "both bricks")
_ADDRESS, _VOLUME = "10.77.0.1", "kv"
_STATES = ("/run", "/var/lib/glusterd", "/var/log/glusterfs")
_BRICKS = ("brick1", "brick2")
_MOUNT = f"glusterfs --volfile-server={_ADDRESS} --volfile-id={_VOLUME} -l {{path}}.log {{path}}"


@contextmanager
def cluster() -> Iterator[Cluster]:
    with space(_ADDRESS, _STATES) as made:
        _begin(made)
        nodes = [made.mounted(name, _MOUNT) for name in ("A", "B")]
        start = partial(_start_bricks, made.server)
        faults = {
            "brick": Fault(partial(_kill, made.server, _BRICKS[:1]), start),
            "both bricks": Fault(partial(_kill, made.server, _BRICKS), start),
        }
        yield Cluster("glusterfs", *nodes, faults)


def _begin(made: Space) -> None:
    made.server.run("mkdir -p /run/gluster && glusterd -p /run/glusterd.pid")
    bricks = " ".join(f"{_ADDRESS}:{made.folder}/{brick}" for brick in _BRICKS)
    for what in (
        f"volume create {_VOLUME} replica 2 {bricks} force",
        f"volume set {_VOLUME} network.ping-timeout 5",
        f"volume start {_VOLUME}",
    ):
        # The daemon answers a while after it has started.
        made.until(f"gluster --mode=script {what}", timeout_s=8)


def _kill(server: Node, bricks: Sequence[str]) -> None:
    for brick in bricks:
        server.run(f"kill -9 $(cat /run/gluster/vols/{_VOLUME}/*-{brick}.pid)")


def _start_bricks(server: Node) -> None:
    """Until they run: the daemon does not start one whose end it has not noticed."""
    start = f"gluster --mode=script volume start {_VOLUME} force"
    online = f"gluster volume status {_VOLUME} detail | grep -c 'Online *: Y'"
    all_run = f"[ $({online}) = {len(_BRICKS)} ]"
    server.run(f"for i in 1 2 3 4 5 6 7 8; do {start}; sleep 1; {all_run} && exit; done; exit 1")
