"""SeaweedFS mounted: a filer that keeps names, a server of volumes, all in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from examples.cluster.seaweedfs import weed_binary
from tests.cluster.nodes import Cluster, Fault
from tests.cluster.spaces import space

FAULTS = ("server",)
_ADDRESS = "10.77.0.3"


@contextmanager
def cluster() -> Iterator[Cluster]:
    weed = weed_binary()
    with space(_ADDRESS) as made:
        folder = made.folder
        made.server.run(f"mkdir {folder}/data")
        start = (
            f"{weed} -logtostderr=true server -dir={folder}/data -ip={_ADDRESS} -filer "
            "-master.volumeSizeLimitMB=256 -volume.max=0 -volume.minFreeSpace=100MiB "
            "-master.electionTimeout=500ms -master.heartbeatInterval=100ms "
            f"-volume.preStopSeconds=0 -master.telemetry=false >> {folder}/log 2>&1 & "
            f"echo $! > {folder}/pid"
        )
        is_up = f"curl -sf http://{_ADDRESS}:8888/ >/dev/null"
        made.server.run(start)
        made.until(is_up)
        mount = (
            f"{weed} mount -filer={_ADDRESS}:8888 -dir={{path}} -dirAutoCreate "
            "-cacheDir={path}.cache > {path}.log 2>&1 & "
            "for i in $(seq 100); do mountpoint -q {path} && exit; sleep 0.2; done; exit 1"
        )
        nodes = [made.mounted(name, mount) for name in ("A", "B")]
        kill = partial(made.server.run, f"kill -9 $(cat {folder}/pid)")
        yield Cluster("seaweedfs", *nodes, {"server": Fault(kill, partial(made.server.run, start))})
