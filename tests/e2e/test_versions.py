"""What one version of vLLM stores all others load, and none keeps a request for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from examples.cluster.processes import VLLM_ENVIRONMENT
from tests.e2e.checks import Prompt, at_once, make_prompt
from tests.e2e.deployment import Deployment
from tests.e2e.engine_fleet import EngineFleet
from tests.e2e.engines import EngineProcess, environment_of, fail_without
from tests.e2e.node import Node
from tests.e2e.versions import BETWEEN, BORDERS, ENDS
from tests.source import ROOT

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LENGTHS = (128, 700, 1500)
MAX_TOKENS = 8
# Each has five full blocks, and grows into a seventh: three need more blocks than there are.
CROWD = (760, 761, 762)
CROWD_TOKENS = 16


@pytest.fixture
def fleet(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Path
) -> Iterator[EngineFleet]:
    made = EngineFleet(Deployment(tmp_path, tiny_model), dict.fromkeys(request.param, tiny_model))
    yield made
    made.end()


@pytest.mark.parametrize(
    "fleet",
    [
        pytest.param(BORDERS, id="borders"),
        pytest.param(ENDS, id="ends", marks=[pytest.mark.long, pytest.mark.versions]),
        pytest.param(BETWEEN, id="between", marks=[pytest.mark.long, pytest.mark.versions]),
    ],
    indirect=True,
)
def test_what_one_version_stores_every_other_loads(fleet: EngineFleet) -> None:
    prompts = {v: [make_prompt(n, f"of {v}") for n in LENGTHS] for v in fleet.models}
    crowds = {v: [make_prompt(n, f"crowd of {v}") for n in CROWD] for v in fleet.models}
    expected = answers_of(fleet, prompts, crowds)

    prefill = fleet.start("kv_producer", Node("kv_producer"))
    at_once(
        partial(check_prefill, engine, [*prompts[version], *crowds[version]], expected)
        for version, engine in prefill.items()
    )
    for prompt in (each for v in fleet.models for each in (*prompts[v], *crowds[v])):
        fleet.deployment.store.wait_stored(prompt)
    fleet.end()

    decode = fleet.start("kv_both", Node("kv_both"))
    at_once(partial(check_decode, engine, prompts, crowds, expected) for engine in decode.values())


_Answers = dict[Prompt, list[int]]


def answers_of(
    fleet: EngineFleet, prompts: dict[str, list[Prompt]], crowds: dict[str, list[Prompt]]
) -> _Answers:
    """Of a vLLM without UCM."""
    plain = fleet.start_plain()
    found: _Answers = {}
    for of_version, max_tokens in ((prompts, MAX_TOKENS), (crowds, CROWD_TOKENS)):
        for prompt in (each for listed in of_version.values() for each in listed):
            ((answer),) = plain("ask", [prompt], max_tokens)
            found[prompt] = answer["tokens"]
    fleet.end()
    return found


def check_prefill(engine: EngineProcess, prompts: list[Prompt], expected: _Answers) -> None:
    """One token each. Prompts are longer than a step. What is given up in the middle leaves too."""
    for prompt in prompts:
        ((answer),) = engine("ask", [prompt], 1)
        assert answer["tokens"] == expected[prompt][:1], f"{engine}, {len(prompt)} tokens"
        assert engine("drain") == [], f"{engine}, {len(prompt)} tokens"
    aborted = make_prompt(1500, f"aborted {engine}")
    assert 0 < engine("abort", aborted) < len(aborted)
    assert engine("drain") == [], f"{engine}, aborted"


def check_decode(
    engine: EngineProcess,
    prompts: dict[str, list[Prompt]],
    crowds: dict[str, list[Prompt]],
    expected: _Answers,
) -> None:
    for writer, listed in prompts.items():
        for prompt in listed:
            ((answer),) = engine("ask", [prompt], MAX_TOKENS)
            what = f"{engine} of {writer or 'own'}, {len(prompt)} tokens"
            assert answer["tokens"] == expected[prompt], what
            assert answer["cached"] == len(prompt) // 128 * 128, what
    for writer, listed in crowds.items():
        answers = engine("ask", listed, CROWD_TOKENS)
        for prompt, answer in zip(listed, answers, strict=True):
            what = f"{engine} of {writer or 'own'}, {len(prompt)} tokens, preempted"
            assert answer["tokens"] == expected[prompt], what
    assert engine("preemptions") > 0, f"{engine}"
    assert 0 < engine("abort", make_prompt(1500, f"aborted by {engine}"))
    assert engine("drain") == [], f"{engine}"
    check_pauses(engine, next(iter(prompts.values()))[-1], expected)


def check_pauses(engine: EngineProcess, prompt: Prompt, expected: _Answers) -> None:
    """In the middle of a load or of an answer, and asleep. A CPU has no memory to give back, but
    all that vLLM asks of a connector before it does."""
    for num_steps in (1, 2, 4):
        what = f"{engine}, paused after {num_steps} steps"
        assert engine("pause", prompt, MAX_TOKENS, "keep", num_steps) == expected[prompt], what
        assert len(engine("pause", prompt, MAX_TOKENS, "abort", num_steps)) < MAX_TOKENS, what
        assert engine("drain") == [], what
    for _ in range(2):
        engine("sleep")
        ((answer),) = engine("ask", [prompt], MAX_TOKENS)
        assert answer["tokens"] == expected[prompt], f"{engine}, slept"
        # The weights may be others now: nothing of before is loaded.
        assert answer["cached"] == 0, f"{engine}, slept"
        assert engine("drain") == [], f"{engine}, slept"
        ((answer),) = engine("ask", [prompt], MAX_TOKENS)
        assert answer["tokens"] == expected[prompt], f"{engine}, awake"
        assert answer["cached"] == len(prompt) // 128 * 128, f"{engine}, awake"
        assert engine("drain") == [], f"{engine}, awake"


@pytest.mark.parametrize(
    "version",
    [
        "",
        *(
            pytest.param(each, id=f"{place}-{each}", marks=[pytest.mark.long, pytest.mark.versions])
            for place, versions in (("ends", ENDS), ("between", BETWEEN))
            for each in versions[1:]
        ),
    ],
    ids=lambda version: version or "own",
)
def test_to_import_the_connector_changes_nothing_of_vllm_and_starts_nothing(version: str) -> None:
    fail_without([version])
    probe = subprocess.run(
        [sys.executable, str(ROOT / "tests/e2e/import_probe.py")],
        env={**os.environ, **VLLM_ENVIRONMENT, **environment_of(version)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert probe.returncode == 0, probe.stderr[-3000:]
    told = json.loads(probe.stdout.splitlines()[-1])
    assert told["loaded by the package"] == []
    assert told["registered"] == ["UCMConnector"]
    assert told["changed"] == []
    assert told["started"] == []
    assert told["seen"] > 1000, "it has looked at vLLM"
