"""A fixture for every filesystem. What isn't installed is skipped, with the one line that installs
all of it; `--install` runs that line first.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest

from examples.cluster.seaweedfs import CREDENTIALS, weed_binary
from tests.cluster import glusterfs, nfs, packages, sshfs
from tests.cluster.nodes import Cluster
from tests.cluster.seaweedfs import SeaweedServer

FILESYSTEMS = (*nfs.OPTIONS, "sshfs", "glusterfs")
_figures: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--install", action="store_true", help="install what clusters need")


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("--install"):
        packages.install()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _figures:
        terminalreporter.section("seen by the other node, seconds")
        for line in _figures:
            terminalreporter.write_line(line)
    for line in packages.install_lines():
        if "cluster" in terminalreporter.config.option.markexpr:
            terminalreporter.write_line(f"not installed (ARGS=--install installs it): {line}")


@pytest.fixture(scope="session")
def machine() -> Iterator[nfs.Machine]:
    with nfs.booted() as machine:
        yield machine


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    """Of S3, for tests of the object tier that run on the other server as well."""
    if weed_binary() is None:
        pytest.skip(f"not installed: {packages.install_lines()[-1]}")
    with SeaweedServer(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def server(shared_server: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> SeaweedServer:
    """With an empty bucket, and credentials in the environment of this process."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    shared_server.clear()
    return shared_server


@pytest.fixture(scope="session", params=FILESYSTEMS)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    name: str = request.param
    kind = name.partition("-")[0]
    if packages.missing([kind]):
        pytest.skip(f"not installed: {packages.install_line(packages.missing())}")
    with ExitStack() as stack:
        if kind == "nfs":
            made = nfs.cluster(request.getfixturevalue("machine"), name)
        else:
            made = sshfs.cluster() if kind == "sshfs" else glusterfs.cluster()
        yield stack.enter_context(made)


@pytest.fixture
def store(cluster: Cluster) -> Iterator[str]:
    """The name of a new one, with a node cache on each node, which end with the test."""
    store = cluster.new_store()
    for each in (cluster.a, cluster.b):
        each.start(store)
    yield store
    for each in (cluster.a, cluster.b):
        each.node.settle()
        each.ask("stop", store)


def record(cluster: Cluster, what: str, delays_s: Sequence[float]) -> None:
    """For the table of docs/storage.md."""
    median_s, worst_s = statistics.median(delays_s), max(delays_s)
    _figures.append(f"{cluster.name:20} {what:26} median {median_s:6.3f}  worst {worst_s:6.3f}")
