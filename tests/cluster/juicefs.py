"""JuiceFS: names in redis, chunks in files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from tests.cluster.nodes import Cluster, Fault
from tests.cluster.packages import juicefs_binary
from tests.cluster.spaces import space

FAULTS = ("redis",)
_ADDRESS = "10.77.0.2"
_META = f"redis://{_ADDRESS}:6379/1"


@contextmanager
def cluster() -> Iterator[Cluster]:
    juicefs = juicefs_binary()
    with space(_ADDRESS) as made:
        folder = made.folder
        # It has what it had when it is started again.
        start = (
            f"redis-server --bind {_ADDRESS} --protected-mode no --dir {folder} --daemonize yes "
            f"--appendonly yes --appendfsync always --pidfile {folder}/redis.pid >/dev/null"
        )
        made.server.run(start)
        made.until(f"{juicefs} format --storage file --bucket {folder}/chunks/ {_META} kv-pages")
        mount = (
            f"{juicefs} mount -d --no-usage-report --log {{path}}.log "
            f"--cache-dir {{path}}.cache --cache-size 64 {_META} {{path}}"
        )
        nodes = [made.mounted(name, mount) for name in ("A", "B")]
        kill = partial(made.server.run, f"kill -9 $(cat {folder}/redis.pid)")
        yield Cluster("juicefs", *nodes, {"redis": Fault(kill, partial(made.server.run, start))})
