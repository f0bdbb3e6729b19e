"""A stand-in for vllm-ascend and a real vLLM on a CPU, over one store: prefill and decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from examples.cluster.processes import ucm_connector
from tests.e2e.checks import Prompt, make_prompt
from tests.e2e.deployment import Deployment
from tests.e2e.engines import EngineProcess, fail_without
from tests.e2e.node import Node, engine_sessions

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LENGTHS = (128, 700, 1500)
MAX_TOKENS = 8
# Three that need more blocks than there are.
CROWD = (760, 761, 762)
CROWD_TOKENS = 16


@dataclass
class Pair:
    """`version`: of the stand-in's vLLM."""

    deployment: Deployment
    model: Path
    version: str
    running: list[EngineProcess] = field(default_factory=list)

    def start(self, kind: str, role: str = "kv_both") -> EngineProcess:
        """`ascend`: without kv_connector_module_path, as its users may have it."""
        transfer: dict[str, Any] | None = None
        if kind != "plain":
            node = Node(f"{kind}-{role}")
            transfer = ucm_connector(self.deployment.settings(node), kv_role=role)
        if kind == "ascend" and transfer is not None:
            del transfer["kv_connector_module_path"]
        plugin = "tests.e2e.ascend_plugin" if kind == "ascend" else ""
        log = self.deployment.folder / f"{kind}-{role}.log"
        version = self.version if kind == "ascend" else ""
        self.running.append(EngineProcess(version, self.model, log, transfer, plugin=plugin))
        assert self.running[-1]("version") == version or not version
        if transfer is not None:
            node.wait("known to its engine", lambda status: _is_known(engine_sessions(status)))
        return self.running[-1]

    def end(self) -> None:
        while self.running:
            self.running.pop().kill()


def _is_known(sessions: dict[str, dict[str, int]]) -> bool:
    return any(each["connections"] > 1 for each in sessions.values())


# Those of vllm-ascend's releases, besides that of the other tests.
@pytest.fixture(
    params=[
        pytest.param("", id="own"),
        pytest.param("0.23.0", id="ends", marks=[pytest.mark.long, pytest.mark.versions]),
        pytest.param("0.26.0", id="between", marks=[pytest.mark.long, pytest.mark.versions]),
    ]
)
def pair(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Path) -> Iterator[Pair]:
    fail_without([request.param])
    made = Pair(Deployment(tmp_path, tiny_model), tiny_model, request.param)
    yield made
    made.end()


def prompts_of(what: str, lengths: Sequence[int] = LENGTHS) -> list[Prompt]:
    return [make_prompt(length, what) for length in lengths]


def check_answers(
    engine: EngineProcess, prompts: Sequence[Prompt], expected: dict[Prompt, list[int]]
) -> None:
    """All that can be is from the store."""
    for prompt in prompts:
        ((answer),) = engine("ask", [prompt], MAX_TOKENS)
        assert answer["tokens"] == expected[prompt], f"{len(prompt)} tokens"
        assert answer["cached"] == len(prompt) // 128 * 128, f"{len(prompt)} tokens"
    assert engine("drain") == []


def test_what_vllm_ascend_s_tensors_hold_a_real_vllm_goes_on_from_and_the_other_way_round(
    pair: Pair,
) -> None:
    """In float32: prompts in chunks, and a crowd that has to give blocks back and is fenced by the
    hooks that vllm-ascend's own connector does hand on."""
    theirs, ours, crowd = prompts_of("ascend"), prompts_of("cpu"), prompts_of("crowd", CROWD)
    plain = pair.start("plain")
    expected: dict[Prompt, list[int]] = {}
    for prompt in (*theirs, *ours, *crowd):
        tokens = CROWD_TOKENS if prompt in crowd else MAX_TOKENS
        ((answer),) = plain("ask", [prompt], tokens)
        expected[prompt] = answer["tokens"]
    pair.end()

    prefill = pair.start("ascend", "kv_producer")
    assert prefill("connector") == "AscendConnector"
    for prompt in theirs:
        ((answer),) = prefill("ask", [prompt], 1)
        assert answer["tokens"] == expected[prompt][:1]
        assert prefill("drain") == []
    assert 0 < prefill("abort", make_prompt(1500, "aborted"))
    assert prefill("drain") == []
    for prompt in theirs:
        pair.deployment.store.wait_stored(prompt)
    pair.end()

    decode = pair.start("cpu")
    check_answers(decode, theirs, expected)
    for prompt in ours:
        decode("ask", [prompt], 1)
        assert decode("drain") == []
        pair.deployment.store.wait_stored(prompt)
    pair.end()

    back = pair.start("ascend")
    check_answers(back, ours, expected)
    answers = back("ask", crowd, CROWD_TOKENS)
    assert [each["tokens"] for each in answers] == [expected[prompt] for prompt in crowd]
    assert back("preemptions") > 0
    assert back("drain") == []
