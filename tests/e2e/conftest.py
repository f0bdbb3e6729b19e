"""Servers for the tests of this folder. A server takes ten seconds and more to start, so tests
share fleets of them; modules run in an order that starts each fleet once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from examples.cluster.models import make_model
from tests.e2e.deployment import Deployment, Fleets, Oracle
from tests.e2e.node import Node

# Within a fleet the destructive ones come last.
MODULES = (
    *("test_identity", "test_sharing", "test_proxy", "test_handoff", "test_handoff_storage"),
    *("test_damaged_files", "test_handoff_stress", "test_crashes"),
    *("test_layouts", "test_bfloat16", "test_handoff_namespaces", "test_images"),
    *("test_files_only", "test_stress", "test_bad_settings", "test_nothing_left"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = [i for i, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    ordered = sorted((items[i] for i in places), key=lambda item: MODULES.index(item.path.stem))
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "tiny")


@pytest.fixture(scope="session")
def fleets() -> Iterator[Fleets]:
    fleets = Fleets()
    yield fleets
    fleets.end()


@pytest.fixture(scope="session")
def started_oracle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    oracle = Oracle(tiny_model, tmp_path_factory.mktemp("oracle"))
    yield oracle
    oracle.server.kill()


@pytest.fixture
def oracle(started_oracle: Oracle) -> Oracle:
    """What a cold monolith answers."""
    started_oracle.server.wait_ready()
    return started_oracle


# vLLM refuses a required tool call without them.
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "pythonic")

DeploymentMaker = Callable[..., Deployment]


@pytest.fixture(scope="session")
def deployment(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> DeploymentMaker:
    """An empty deployment in a folder of its own."""

    def make(name: str, dtype: str = "float32") -> Deployment:
        return Deployment(tmp_path_factory.mktemp(name), tiny_model, dtype=dtype)

    return make


@pytest.fixture(scope="session")
def use_float32(
    fleets: Fleets, deployment: DeploymentMaker, started_oracle: Oracle
) -> Callable[[], Deployment]:
    """Four float32 servers on two nodes: prefill chunks of 512 and 4096, copied after the forward
    pass and layer by layer. None has a prefix cache of its own. The first two take tools."""

    def start() -> Deployment:
        made = deployment("float32")
        one, two = Node("f32-one"), Node("f32-two")
        made.start("chunk512", one, chunk=512, args=TOOLS)
        made.start("chunk512-layerwise", one, chunk=512, layerwise=True, args=TOOLS)
        made.start("chunk4096", two, chunk=4096)
        made.start("chunk4096-layerwise", two, chunk=4096, layerwise=True)
        return made

    return partial(fleets.use, "float32", start)


@pytest.fixture
def float32_fleet(use_float32: Callable[[], Deployment]) -> Deployment:
    return use_float32()


@pytest.fixture
def bfloat16_fleet(fleets: Fleets, deployment: DeploymentMaker) -> Deployment:
    """Two bfloat16 servers with prefix caches, on two nodes; and one in float32, which can reset
    its cache."""

    def start() -> Deployment:
        made = deployment("bfloat16", "bfloat16")
        one, two = Node("bf16-one"), Node("bf16-two")
        made.start("chunk512-layerwise", one, chunk=512, layerwise=True, prefix_caching=True)
        made.start("chunk4096", two, chunk=4096, prefix_caching=True)
        made.start("float32", two, dtype="float32", env={"VLLM_SERVER_DEV_MODE": "1"})
        return made

    return fleets.use("bfloat16", start)
