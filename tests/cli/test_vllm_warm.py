"""`ucm warm` before a new node's engine comes: its hits are from memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("vllm")

from examples.cluster.client import by_label
from examples.cluster.models import make_model
from examples.cluster.processes import VllmServer
from tests.e2e.checks import counted, make_prompt
from tests.e2e.deployment import Deployment
from tests.e2e.node import Node
from ucm.store.inspect.warm_pages import Warmed

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(600)]

PROMPTS = [make_prompt(300, f"warm {number}") for number in range(100)]
# As the servers are started.
FLAGS = ("--", "--dtype", "float32", "--max-model-len", "4096")


def from_files(server: VllmServer) -> dict[str, float]:
    return dict(by_label(server.client.metrics(), "ucm_hit_tokens_total", "source"))


def test_hits_of_warmed_prompts_are_from_memory_alone(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "tiny")
    prompts = "".join(json.dumps(prompt) + "\n" for prompt in PROMPTS)
    with Deployment(tmp_path, model) as made:
        first = made.start("first", Node("warm-first"))
        made.wait_ready()
        for prompt in PROMPTS:
            first.client.complete(prompt, max_tokens=1)
        made.store.wait_stored(PROMPTS[-1])
        expected = [first.client.complete(prompt).token_ids for prompt in PROMPTS[:5]]
        first.server.kill()

        # The engine's settings, before there is one.
        node = Node("warm-second")
        settings = tmp_path / "second.yaml"
        settings.write_text(json.dumps(made.settings(node, use_layerwise=False)))
        command = ["warm", str(settings), "--model", str(model), "--prompts", "-", "--json"]
        with subprocess.Popen(
            [sys.executable, "-m", "ucm.cli.main", *command, "--hold", "300", *FLAGS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as warming:
            assert warming.stdin is not None and warming.stdout is not None
            warming.stdin.write(prompts)
            warming.stdin.close()
            warmed = msgspec.json.decode(warming.stdout.readline(), type=Warmed)
            assert (warmed.num_prompts, warmed.read, warmed.missing) == (100, 200, 0)
            # It takes longer to come than a node cache waits here.
            second = made.start("second", node)
            made.engines.pop("first")
            made.wait_ready()
            assert warming.wait(timeout=30) == 0
        before = second.client.counters()
        answers = [second.client.complete(prompt).token_ids for prompt in PROMPTS]
        gained = counted(second.client, before, 100 * 300)
        assert answers[:5] == expected
        assert gained.external_hits == 100 * 256
        assert from_files(second.server) == {"memory": 100 * 256, "files": 0}
