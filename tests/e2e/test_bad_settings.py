"""vLLM does not start with settings that can't work, and says in one line why."""

from __future__ import annotations

import pytest

from examples.cluster.processes import VllmServer

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
    server = refused[name]
    assert server.wait(120.0) not in (0, None)
    assert any(line in text for text in server.log_text().splitlines()), server.log_tail()
