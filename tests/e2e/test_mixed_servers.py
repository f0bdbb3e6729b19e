"""A prefill server of one version of vLLM before a decode server of another, behind the proxy."""

from __future__ import annotations

import sys

import pytest

from tests.e2e.conftest import DeploymentMaker
from tests.e2e.deployment import Deployment, Fleets, Oracle
from tests.e2e.engines import environment_of, fail_without
from tests.e2e.node import Node
from tests.e2e.races import race

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.long,
    pytest.mark.versions,
    pytest.mark.timeout(600),
]

OLD = "0.28.0"
# Where the server of the other tests starts is not where it did then.
LAUNCHER = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")
PLACES = {"p1": "old", "d1": "own"}


@pytest.fixture
def mixed_fleet(fleets: Fleets, deployment: DeploymentMaker) -> Deployment:
    fail_without([OLD])

    def start() -> Deployment:
        made = deployment("mixed")
        made.start(
            "old",
            Node("mixed-prefill"),
            chunk=512,
            role="kv_producer",
            launcher=LAUNCHER,
            env=environment_of(OLD),
        )
        made.start("own", Node("mixed-decode"))
        return made

    return fleets.use("mixed", start)


@pytest.mark.parametrize("handoff", ["chain", "overlap"])
def test_of_a_prompt_prefilled_by_an_older_version_decode_loads_every_promised_token_at_once(
    mixed_fleet: Deployment, oracle: Oracle, handoff: str
) -> None:
    assert f"version {OLD}" in mixed_fleet["old"].server.log_text()
    race(mixed_fleet, oracle, PLACES, handoff, num_prompts=20, salt=f"mixed {handoff}")
