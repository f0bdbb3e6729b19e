"""vLLM does not start with settings that can't work, and says in one line why."""

from __future__ import annotations

import pytest

from examples.cluster.processes import VllmServer
from tests.e2e.checks import check_refused

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

STORE = "ucm_connectors[0].ucm_connector_config"


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
    check_refused(refused[name], line, timeout_s=120.0)
