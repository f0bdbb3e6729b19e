"""A fixture for every filesystem. What isn't installed is skipped, with the one line that installs
all of it; `--install` runs that line first.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest

from examples.cluster.seaweedfs import CREDENTIALS, weed_binary
from tests.cluster import cephfs, glusterfs, juicefs, nfs, packages, seaweed_mounts, sshfs
from tests.cluster.nodes import Cluster
from tests.cluster.seaweedfs import SeaweedServer

# With their faults; a test of another one is not run on them.
FILESYSTEMS = {
    **nfs.FAULTS,
    "sshfs": sshfs.FAULTS,
    "glusterfs": glusterfs.FAULTS,
    "cephfs": cephfs.FAULTS,
    "juicefs": juicefs.FAULTS,
    "seaweedfs": seaweed_mounts.FAULTS,
}
_CLUSTERS = {
    "sshfs": sshfs.cluster,
    "glusterfs": glusterfs.cluster,
    "cephfs": cephfs.cluster,
    "juicefs": juicefs.cluster,
    "seaweedfs": seaweed_mounts.cluster,
}
# What lookupcache=positive makes a difference to.
_OF_LOOKUPS = ("test_visible", "test_pages")
_figures: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--install",
        nargs="?",
        const=",".join(packages.OF),
        default="",
        help="install what clusters need: of all filesystems, or of these",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    filesystems = session.config.getoption("--install")
    if filesystems:
        packages.install(filesystems.split(","))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if not _is_one(item)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _is_one(item)]


def _is_one(item: pytest.Item) -> bool:
    """Whether there is anything to see: a fault that the filesystem has, if the test is about one,
    and what an option changes, on those that differ in it alone."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    filesystem, fault = params.get("cluster"), params.get("fault")
    if filesystem not in FILESYSTEMS:
        return True
    if filesystem.endswith("-positive") and item.path.stem not in _OF_LOOKUPS:
        return False
    return fault is None or fault in FILESYSTEMS[filesystem]


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
    kind = name if name in packages.OF else name.partition("-")[0]
    if not packages.is_usable(kind):
        pytest.skip(f"not installed: {'; '.join(packages.install_lines())}")
    if name in _CLUSTERS and not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("there is no /dev/fuse")
    with ExitStack() as stack:
        if name in _CLUSTERS:
            made = _CLUSTERS[name]()
        else:
            made = nfs.cluster(request.getfixturevalue("machine"), name)
        cluster = stack.enter_context(made)
        assert set(cluster.faults) == set(FILESYSTEMS[name])
        yield cluster


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
