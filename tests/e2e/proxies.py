"""The proxy before a deployment's servers, started by a line as the documents have it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import Template

from examples.cluster.processes import HttpServer, free_port
from tests.e2e.deployment import Deployment
from ucm.pd import toy_proxy_server

ONE_TO_ONE = (
    "--pd-disaggregation --host localhost --port $port --prefiller-host 127.0.0.1"
    " --prefiller-port $p1 --decoder-host 127.0.0.1 --decoder-port $d1"
)

TWO_TO_TWO = (
    "--pd-disaggregation --host localhost --port $port --prefiller-hosts 127.0.0.1 127.0.0.1"
    " --prefiller-port $p1 $p2 --decoder-hosts 127.0.0.1 127.0.0.1 --decoder-ports $d1 $d2"
)

# In the float32 fleet: names in flags, and engines.
PLACES = {
    "p1": "chunk512",
    "p2": "chunk4096",
    "d1": "chunk512-layerwise",
    "d2": "chunk4096-layerwise",
}


@contextmanager
def proxy(deployment: Deployment, flags: str, places: Mapping[str, str]) -> Iterator[HttpServer]:
    """Started with its script's name in its own folder, as the documents do. `places` says which
    engine stands for a name in `flags`."""
    port = free_port()
    ports = {name: deployment[engine].server.port for name, engine in places.items()}
    line = Template(flags).substitute(ports, port=port)
    command = [sys.executable, "toy_proxy_server.py", *shlex.split(line)]
    cwd = Path(toy_proxy_server.__file__).parent
    log = deployment.folder / f"proxy-{port}.log"
    with HttpServer(command, port=port, log=log, cwd=cwd) as server:
        server.wait_ready()
        yield server
