"""Many clients, two prefillers and two decoders, clients that hang up, and an engine that dies."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import pytest

from examples.cluster.processes import HttpServer
from tests.e2e.checks import Prompt, abandon, at_once, make_prompt, metric, wait_until
from tests.e2e.deployment import MAX_TOKENS, Deployment, Oracle
from tests.e2e.proxies import PLACES, TWO_TO_TWO, proxy
from tests.e2e.watch import cpu_s

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

NUM_CLIENTS = 64
VICTIM = PLACES["d2"]


def mixed_prompts() -> list[Prompt]:
    """Families with a common prefix, and loners."""
    found: list[Prompt] = []
    for family, num_blocks in enumerate((2, 5, 9)):
        prefix = make_prompt(num_blocks * 128, f"handoff family {family}")
        found += [prefix + make_prompt(70, f"handoff member {family} {i}") for i in range(4)]
    return found + [make_prompt(150 * i + 40, f"handoff loner {i}") for i in range(1, 9)]


def test_clients_that_stay_get_right_answers_while_others_leave_and_a_decode_engine_is_restarted(
    float32_fleet: Deployment, oracle: Oracle
) -> None:
    prompts = mixed_prompts()
    expected = oracle.answers(prompts)

    def client(fronts: list[HttpServer], number: str, *, asks: int) -> None:
        rng = random.Random(number)
        for _ in range(asks):
            prompt, front = rng.choice(prompts), rng.choice(fronts)
            if rng.random() < 0.25:
                abandon(front.client, prompt, after_s=rng.uniform(0.0, 0.8))
                continue
            # Some of them are new to the store each time.
            salt = rng.choice(["", "", number])
            extra = {"cache_salt": salt} if salt else {}
            answer = front.client.complete(prompt, max_tokens=MAX_TOKENS, **extra)
            assert answer.token_ids == expected[prompt]

    def restart() -> None:
        time.sleep(1.0)
        float32_fleet[VICTIM].server.kill()
        float32_fleet.start_again(VICTIM)

    with ExitStack() as stack:
        fronts = [
            stack.enter_context(proxy(float32_fleet, f"{TWO_TO_TWO} --handoff {handoff}", PLACES))
            for handoff in ("chain", "overlap")
        ]
        calls: list[Callable[[], None]] = [restart]
        calls += [partial(client, fronts, f"first {i}", asks=2) for i in range(NUM_CLIENTS)]
        at_once(calls)
        retries = sum(metric(front.client, "ucm_pd_retries_total") for front in fronts)
        float32_fleet[VICTIM].server.wait_ready()
        at_once(partial(client, fronts, f"second {i}", asks=1) for i in range(NUM_CLIENTS))
    assert retries > 0, "the engine died when nobody needed it"
    check_at_rest(float32_fleet)
    assert float32_fleet.store.bad_files() == []


def check_at_rest(fleet: Deployment) -> None:
    """Nobody runs, waits or holds anything, and no engine polls as fast as it can."""
    for engine in fleet.engines.values():
        for what in ("running", "waiting"):
            name = f"vllm:num_requests_{what}"
            wait_until(
                lambda name=name, engine=engine: metric(engine.client, name) == 0,  # type: ignore[misc]
                f"{engine.name}: none {what}",
            )
        engine.node.wait_quiet()
    processes = [one for engine in fleet.engines.values() for one in engine.server.processes()]
    assert len(processes) >= 3 * len(fleet.engines)
    # vLLM's workers go on for a second after a step.
    wait_until(lambda: cpu_s(processes, over_s=1.5) < 0.5 * 1.5, "nobody works")
