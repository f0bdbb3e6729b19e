"""Servers for the tests of this folder. A server takes ten seconds and more to start, so tests
share fleets of them; modules run in an order that starts each fleet once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from examples.cluster.models import make_model
from examples.cluster.processes import MIB, VllmServer, ucm_connector
from examples.cluster.serve_vllm import FORK_VARIABLE
from tests.e2e.deployment import Deployment, Fleets, Oracle
from tests.e2e.node import Node

# Within a fleet the destructive ones come last.
MODULES = (
    *("test_identity", "test_sharing", "test_proxy", "test_proxy_protocols"),
    *("test_handoff", "test_handoff_storage", "test_affinity"),
    *("test_conversations", "test_answers_kept"),
    *("test_damaged_files", "test_handoff_stress", "test_crashes"),
    *("test_layouts", "test_bfloat16", "test_handoff_namespaces", "test_images"),
    *("test_hybrid_models", "test_hybrid_handoff", "test_late_strands", "test_drafts"),
    *("test_refused_models",),
    *(
        "test_what_shapes_kv",
        "test_no_hits",
        "test_files_only",
        "test_s3",
        "test_near_far",
        "test_load_policy",
    ),
    *("test_stress", "test_abort_storm", "test_faulty_storage", "test_killed_at_random"),
    *("test_bad_settings", "test_tiering", "test_ascend"),
    *("test_versions", "test_mixed_servers", "test_picture_versions", "test_nothing_left"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = [i for i, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    if new := sorted({items[i].path.stem for i in places}.difference(MODULES)):
        raise pytest.UsageError(f"{new[0]} has no place in the order of MODULES ({__file__})")
    ordered = sorted((items[i] for i in places), key=lambda item: MODULES.index(item.path.stem))
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


@pytest.fixture(autouse=True, scope="session")
def forked_servers() -> Iterator[None]:
    """Servers that start in half the time."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(FORK_VARIABLE, "1")
        yield


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

# What clients ask of engines behind a proxy: how much was cached, and responses that are kept.
DETAILS = ("--enable-prompt-tokens-details",)
KEEPS_RESPONSES = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}

DeploymentMaker = Callable[[str], Deployment]


@pytest.fixture(scope="session")
def deployment(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> DeploymentMaker:
    """An empty deployment in a folder of its own."""

    def make(name: str) -> Deployment:
        return Deployment(tmp_path_factory.mktemp(name), tiny_model)

    return make


@pytest.fixture(scope="session")
def use_float32(
    fleets: Fleets, deployment: DeploymentMaker, started_oracle: Oracle
) -> Callable[[], Deployment]:
    """Four float32 servers on two nodes: prefill chunks of 512 and 4096, copied after the forward
    pass and layer by layer. None has a prefix cache of its own. The first two take tools; all keep
    responses, and say what was cached."""

    def start() -> Deployment:
        made = deployment("float32")
        one, two = Node("f32-one"), Node("f32-two")
        start = partial(made.start, env=KEEPS_RESPONSES)
        tools = (*TOOLS, *DETAILS)
        start("chunk512", one, chunk=512, args=tools)
        start("chunk512-layerwise", one, chunk=512, layerwise=True, args=tools)
        start("chunk4096", two, chunk=4096, args=DETAILS)
        start("chunk4096-layerwise", two, chunk=4096, layerwise=True, args=DETAILS)
        return made

    return partial(fleets.use, "float32", start)


@pytest.fixture
def float32_fleet(use_float32: Callable[[], Deployment]) -> Deployment:
    return use_float32()


@pytest.fixture
def unlike_fleet(fleets: Fleets, deployment: DeploymentMaker) -> Deployment:
    """Servers that differ in more than how they cut and copy. `plain` can reset its cache. The two
    in bfloat16 have prefix caches, and nodes to themselves."""

    def make() -> Deployment:
        made = deployment("unlike")
        one, two, three = Node("unlike-one"), Node("unlike-two"), Node("unlike-three")
        # Asked one after the other: less memory for each leaves more for so many.
        start = partial(made.start, kv_cache_bytes=64 * MIB)
        start("plain", one, env={"VLLM_SERVER_DEV_MODE": "1"})
        start("tp2", one, layerwise=True, args=["--tensor-parallel-size", "2"])
        start("block64", one, layerwise=True, block_size=64)
        start("block32", one, block_size=32, prefix_caching=True)
        start("opaque", one, kv_layout="opaque")
        bfloat16 = partial(start, dtype="bfloat16", prefix_caching=True)
        bfloat16("bfloat16-layerwise", two, chunk=512, layerwise=True)
        bfloat16("bfloat16", three)
        return made

    return fleets.use("unlike", make)


@pytest.fixture(scope="session")
def refused(deployment: DeploymentMaker, tiny_model: Path) -> Iterator[dict[str, VllmServer]]:
    """One server for each thing that can be wrong in the settings. They end by themselves, after as
    long as others take to start: ask for them where a core is idle."""
    made = deployment("refused")
    misspelled = made.settings(Node("refused"))
    misspelled["ucm_connectors"][0]["ucm_connector_config"]["store_pipline"] = "Cache|Posix"
    configs: dict[str, Any] = {
        "misspelled": misspelled,
        "smaller blocks": made.settings(Node("refused"), block_tokens=64),
    }
    servers = {
        name: VllmServer(
            tiny_model, log=made.folder / f"{name}.log", kv_transfer=ucm_connector(config)
        )
        for name, config in configs.items()
    }
    yield servers
    for server in servers.values():
        server.kill()
