"""`ucm warm` before a new node's engine comes: its hits are from memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm")

from examples.cluster.client import by_label
from examples.cluster.models import make_model
from examples.cluster.processes import VllmServer
from tests.cli.parts import ucm
from tests.e2e.checks import counted, make_prompt
from tests.e2e.deployment import Deployment
from tests.e2e.node import Node
from ucm.store.inspect.engine_identity import EngineQuestion, ask_vllm
from ucm.store.inspect.given_prompts import read_prompts
from ucm.store.inspect.warm_pages import Warmed

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(600)]

PROMPTS = [make_prompt(300, f"warm {number}") for number in range(100)]
# As the servers are started.
FLAGS = ("--", "--dtype", "float32", "--max-model-len", "4096")
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% if is_short %}Be short. {% endif %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# As agents send them, each longer than a block.
TEXT = "A page that one machine has computed need not be computed by another again. " * 20
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
PLAIN: dict[str, Any] = {"messages": [{"role": "user", "content": TEXT}]}
IN_PARTS: dict[str, Any] = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": TEXT}]}],
}
CHATS: list[dict[str, Any]] = [
    PLAIN,
    {**IN_PARTS, "tools": [TOOL]},
    {**IN_PARTS, "chat_template_kwargs": {"is_short": True}},
    {**PLAIN, "add_generation_prompt": False},
]


def from_files(server: VllmServer) -> dict[str, float]:
    return dict(by_label(server.client.metrics(), "ucm_hit_tokens_total", "source"))


def test_chats_are_warmed_as_clients_send_them(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "tiny")
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    flags = ("--chat-template", str(template), "--enable-auto-tool-choice")
    flags += ("--tool-call-parser", "hermes")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(each) + "\n" for each in [*CHATS, IN_PARTS]))
    with Deployment(tmp_path, model) as made:
        engine = made.start("chats", Node("warm-chats"), args=flags)
        made.wait_ready()
        by_server = []
        for chat in CHATS:
            status, told = engine.client.post("/tokenize", chat)
            assert status == 200, told
            by_server.append(json.loads(told)["tokens"])
            status, told = engine.client.post("/v1/chat/completions", {**chat, "max_tokens": 1})
            assert status == 200, told
            made.store.wait_stored(by_server[-1])
        question = EngineQuestion(
            model=str(model),
            vllm_args=[*FLAGS[1:], *flags],
            config_file="",
            prompts=read_prompts(str(prompts)),
            adapters=[],
        )
        assert ask_vllm(question).tokens == [*by_server, by_server[0]]

        settings = tmp_path / "other.yaml"
        settings.write_text(json.dumps(made.settings(Node("warm-chats-other"))))
        command = ["warm", str(settings), "--model", str(model), "--prompts", str(prompts)]
        done = ucm(*command, "--json", *FLAGS, *flags)
        assert (done.returncode, done.stderr) == (0, "")
        warmed = msgspec.json.decode(done.stdout, type=Warmed)
        blocks = [len(tokens) // 128 for tokens in by_server]
        assert min(blocks) > 1 and warmed.missing == 0
        # Some begin alike.
        num_pages = sum(blocks) + blocks[0]
        assert warmed.read + warmed.in_memory == num_pages and warmed.read > blocks[0]

        # An engine with another dtype finds none of that, and a store that is not mounted none.
        bfloat16 = (*FLAGS[:2], "bfloat16", *FLAGS[3:])
        done = ucm(*command, *bfloat16, *flags)
        assert done.returncode == 0 and f"{num_pages} not in the store" in done.stdout
        assert "ucm explain" in done.stderr
        made.store.folder.rename(tmp_path / "elsewhere")
        done = ucm(*command, *FLAGS, *flags)
        assert (done.returncode, done.stdout) == (1, "")
        assert str(made.store.folder) in done.stderr and not made.store.folder.exists()
        (tmp_path / "elsewhere").rename(made.store.folder)


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
