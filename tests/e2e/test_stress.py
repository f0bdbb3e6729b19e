"""Too little device memory, too little node cache, too many clients, and some that hang up."""

from __future__ import annotations

import random
from functools import partial

import pytest

from examples.cluster.processes import MIB
from tests.e2e.checks import (
    Prompt,
    abandon,
    asking,
    at_once,
    check_answer,
    check_loaded,
    make_prompt,
    metric,
    wait_until,
)
from tests.e2e.conftest import DeploymentMaker
from tests.e2e.deployment import Deployment, Engine, Fleets, Oracle
from tests.e2e.node import Node, engine_sessions, engines_of, is_quiet
from tests.e2e.watch import cpu_s
from ucm.store.node.protocol import Status

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

NUM_CLIENTS = 16
ASKED_BY_EACH = 7
MAX_TOKENS = 24
# Sixteen pages: fewer than a prompt of 3500 tokens has.
NODE_MIB = 8
# One prompt of --max-model-len, and little more: a third of the clients' prompts at once.
KV_CACHE_BYTES = 24 * MIB


@pytest.fixture
def cramped(fleets: Fleets, deployment: DeploymentMaker, started_oracle: Oracle) -> Deployment:
    def start() -> Deployment:
        made = deployment("cramped")
        node = Node("cramped", capacity_mib=NODE_MIB)
        made.start("prefill", node, chunk=512, prefix_caching=True, kv_cache_bytes=KV_CACHE_BYTES)
        made.start("decode", node, layerwise=True, kv_cache_bytes=KV_CACHE_BYTES)
        return made

    return fleets.use("cramped", start)


def test_of_a_prompt_longer_than_the_node_cache_can_hold_a_shorter_prefix_is_loaded(
    cramped: Deployment, oracle: Oracle
) -> None:
    prompt = make_prompt(3500, "longer than the node cache")
    check_answer(cramped["prefill"], prompt, oracle.answer(prompt))
    cramped["prefill"].node.wait_quiet()
    num_stored = sum(file.exists() for file in cramped.store.files(prompt))
    assert num_stored >= 16, "of what did not fit a part may be missing, from the end"
    assert not any(file.exists() for file in cramped.store.files(prompt)[num_stored:])
    check_loaded(cramped["decode"], prompt, oracle.answer(prompt), hit_tokens=16 * 128)
    cramped["decode"].node.wait_quiet()


def test_a_request_abandoned_while_it_waits_for_device_memory_gives_back_what_was_pinned_for_it(
    cramped: Deployment, oracle: Oracle
) -> None:
    engine = cramped["decode"]
    node = engine.node
    prompt = make_prompt(1500, "waits for memory")
    check_answer(engine, prompt, oracle.answer(prompt))
    cramped.store.wait_stored(prompt)
    node.wait_quiet()
    # Of the device's 47 blocks 37 at first and 46 at last: they leave too few for the prompt for as
    # long as the test takes, and each other enough.
    first, second = (make_prompt(length, "takes the memory") for length in (2700, 1900))
    computed = metric(engine.client, "vllm:prompt_tokens_total")
    with (
        asking(engine.client, first, max_tokens=600),
        asking(engine.client, second, max_tokens=600),
    ):
        wait_until(
            lambda: metric(engine.client, "vllm:prompt_tokens_total") - computed >= 4600,
            "both prompts are computed",
        )
        # What is being written of them would leave less room than the prompt needs.
        node.wait("all written", is_quiet)
        with asking(engine.client, prompt):
            node.wait("pinned", lambda status: pins(status) == len(prompt) // 128)
        node.wait("given back", lambda status: not pins(status))
        assert running(engine) == 2, "memory was not what it waited for"
    node.wait_quiet()
    wait_until(lambda: running(engine) == 0, "all have ended")
    check_answer(engine, prompt, oracle.answer(prompt))


def test_under_stress_every_answer_is_right_and_afterwards_nothing_is_held_and_nothing_moves(
    cramped: Deployment, oracle: Oracle
) -> None:
    prompts = stress_prompts()
    expected = {prompt: oracle.answer(prompt, max_tokens=MAX_TOKENS) for prompt in prompts}
    engines = [cramped["prefill"], cramped["decode"]]

    def client(number: int) -> None:
        rng = random.Random(number)
        for _ in range(ASKED_BY_EACH):
            prompt = rng.choice(prompts)
            if rng.random() < 0.3:
                abandon(rng.choice(engines).client, prompt, after_s=rng.uniform(0.0, 0.8))
                continue
            for engine in rng.choice([engines, engines, engines[:1], engines[1:]]):
                check_answer(engine, prompt, expected[prompt])

    at_once(partial(client, number) for number in range(NUM_CLIENTS))
    status = engines[0].node.wait_quiet()
    assert len(engines_of(status)) == 2
    for engine in engines:
        check_idle(engine)
    assert sum(preemptions(engine) for engine in engines) > 0, "the test must be harder"
    assert cramped.store.bad_files() == []
    for prompt in prompts[:4]:
        for engine in engines:
            check_answer(engine, prompt, expected[prompt])


def stress_prompts() -> list[Prompt]:
    """Families with common prefixes, loners, and one that fills the device by itself. Most end
    just before a block does, so that their answers need another one."""
    found: list[Prompt] = []
    for family, num_blocks in enumerate((1, 3, 5, 8)):
        prefix = make_prompt(num_blocks * 128, f"family {family}")
        found += [prefix + make_prompt(120, f"member {family} {i}") for i in range(4)]
    found += [make_prompt(128 * i + 118, f"loner {i}") for i in range(9)]
    found.append(make_prompt(3500, "giant"))
    return found


def pins(status: Status) -> int:
    return sum(fields["pins"] for fields in engine_sessions(status).values())


def running(engine: Engine) -> int:
    return metric(engine.client, "vllm:num_requests_running")


def check_idle(engine: Engine) -> None:
    """No request left in vLLM, and its engine sleeps: one that holds back device blocks wakes up
    every millisecond."""
    assert running(engine) == 0
    assert metric(engine.client, "vllm:num_requests_waiting") == 0
    cores = engine.server.processes("VLLM::EngineCore")
    assert cores
    assert cpu_s(cores, over_s=2.0) < 0.2


def preemptions(engine: Engine) -> int:
    return metric(engine.client, "vllm:num_preemptions_total")
