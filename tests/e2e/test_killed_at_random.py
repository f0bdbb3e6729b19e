"""kill -9 of engines and their node cache, at any instant, while both write and read: right answers
and whole files. `tests/faults/test_killed_at_random.py` does it without engines, more often."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException

import pytest

from examples.cluster.client import RequestFailed
from tests.e2e.checks import Prompt, check_answer, make_prompt, wait_for_hit
from tests.e2e.conftest import DeploymentMaker
from tests.e2e.deployment import Deployment, Fleets, Oracle
from tests.e2e.node import Node
from ucm.errors import UcmError

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(1200)]

NUM_ENGINE_KILLS = 4
NODE_CACHE_KILLS_EACH = 4
ENGINES = ("one", "two")


@pytest.fixture
def fleet(fleets: Fleets, deployment: DeploymentMaker) -> Deployment:
    """Two engines of one node, whose memory is small."""

    def start() -> Deployment:
        made, node = deployment("killed"), Node("killed", capacity_mib=32)
        for name in ENGINES:
            made.start(name, node, chunk=512)
        return made

    return fleets.use("killed", start)


class Clients:
    """Of all engines, which may be gone at any moment."""

    def __init__(self, fleet: Deployment, expected: dict[Prompt, tuple[int, ...]]) -> None:
        self._fleet = fleet
        self._expected = expected
        self._stop = threading.Event()
        self.num_answered = 0
        self.wrong: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._ask, args=[name, seed])
            for name in ENGINES
            for seed in range(2)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self, name: str, seed: int) -> None:
        rng, prompts = random.Random(f"{name} {seed}"), list(self._expected)
        while not self._stop.is_set():
            prompt = rng.choice(prompts)
            try:
                check_answer(self._fleet[name], prompt, self._expected[prompt])
                self.num_answered += 1
            except (OSError, HTTPException, RequestFailed):
                time.sleep(0.2)
            except BaseException as error:  # noqa: BLE001 - raised in the test's thread
                self.wrong.append(error)
                return

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self.wrong, self.wrong[0]


def kill_in_turn(fleet: Deployment, clients: Clients, on_kill: Callable[[str], None]) -> None:
    rng = random.Random(12)
    for _ in range(NUM_ENGINE_KILLS):
        for _ in range(NODE_CACHE_KILLS_EACH):
            time.sleep(rng.uniform(0.5, 2.0))
            with suppress(UcmError):
                fleet[ENGINES[0]].node.kill()
                on_kill("node cache")
        name = rng.choice(ENGINES)
        fleet[name].server.kill()
        on_kill("engine")
        fleet.start_again(name)
        fleet[name].server.wait_ready()
        assert not clients.wrong, clients.wrong[0]


def test_whatever_is_killed_answers_are_right_and_files_whole(
    fleet: Deployment, oracle: Oracle
) -> None:
    prompts = [make_prompt(length, f"killed {i}") for i in range(10) for length in (700, 1500)]
    expected = oracle.answers(prompts)
    killed: list[str] = []
    clients = Clients(fleet, expected)
    try:
        kill_in_turn(fleet, clients, killed.append)
    finally:
        clients.end()
    print(f"{clients.num_answered} answers, {killed.count('engine')} engines killed, "
          f"{killed.count('node cache')} node caches")  # fmt: skip
    assert clients.num_answered > len(prompts)
    fleet[ENGINES[0]].node.wait_quiet()
    assert fleet.store.bad_files() == []
    assert fleet.store.quarantined() == []
    for name in ENGINES:
        for prompt in prompts:
            check_answer(fleet[name], prompt, expected[prompt])
        wait_for_hit(fleet[name], prompts[0])
