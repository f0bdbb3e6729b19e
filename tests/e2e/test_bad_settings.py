"""vLLM does not start with settings that can't work, and says in one line why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from examples.cluster.processes import VllmServer, ucm_connector
from tests.e2e.conftest import DeploymentMaker
from tests.e2e.deployment import Fleets
from tests.e2e.node import Node

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

STORE = "ucm_connectors[0].ucm_connector_config"


@pytest.fixture(scope="module")
def refused(
    fleets: Fleets, deployment: DeploymentMaker, tiny_model: Any
) -> Iterator[dict[str, VllmServer]]:
    """One server for each thing that is wrong, all started at once."""
    fleets.end()
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


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "misspelled",
            f"{STORE}.store_pipline: unknown setting, did you mean store_pipeline?",
        ),
        (
            "smaller blocks",
            "block_tokens is 64 and the engine's --block-size is 128: UCM's blocks must be",
        ),
    ],
)
def test_vllm_does_not_start_and_one_line_of_its_output_says_why(
    refused: dict[str, VllmServer], name: str, line: str
) -> None:
    server = refused[name]
    assert server.wait(120.0) not in (0, None)
    assert any(line in text for text in server.log_text().splitlines()), server.log_tail()
