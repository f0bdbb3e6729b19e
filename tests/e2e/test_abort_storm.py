"""Two hundred clients of whom half hang up, while heads of prompts vanish from the store and the
node cache is killed: nothing may end an engine, change an answer of those who stay, or be held
for those who left."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from examples.cluster.client import total
from examples.cluster.processes import MIB
from tests.e2e.checks import (
    Prompt,
    abandon,
    asking,
    at_once,
    check_answer,
    counted,
    make_prompt,
    metric,
    wait_until,
)
from tests.e2e.conftest import DeploymentMaker
from tests.e2e.deployment import Deployment, Engine, Fleets, Oracle
from tests.e2e.node import Node, engines_of

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(1500)]

STORM_S = 300.0
NUM_CLIENTS = 200
MAX_TOKENS = 24
# A slot holds 512 KiB: fewer than the prompts have blocks, so that pages come from files too.
NODE_MIB = 32
# For about 11 prompts, or a third of the clients' where they share heads: there are preemptions,
# and what vLLM's own cache still has of a prompt is by chance its head, all of it, or nothing.
KV_CACHE_BYTES = 48 * MIB
MAX_RUNNING = "64"
KILLED_EVERY_S = 20.0
HEAD_REMOVED_EVERY_S = 0.1
# Of the prompts whose heads are lost, and how much of them that is.
ROUNDS, TRIES = 4, 12
HEAD = 256


@pytest.fixture
def stormy(fleets: Fleets, deployment: DeploymentMaker, started_oracle: Oracle) -> Deployment:
    """Both engines keep blocks of their own too: only then can the head of a prompt be there
    that the store has lost, and have to be stored while the tail is being loaded."""

    def start() -> Deployment:
        made = deployment("stormy")
        node = Node("stormy", capacity_mib=NODE_MIB)
        for name, layerwise in (("whole", False), ("layerwise", True)):
            made.start(
                name,
                node,
                chunk=512,
                layerwise=layerwise,
                prefix_caching=True,
                kv_cache_bytes=KV_CACHE_BYTES,
                args=["--max-num-seqs", MAX_RUNNING],
            )
        return made

    return fleets.use("stormy", start)


class Storm:
    """What all of its threads share. The first that fails ends it for all."""

    def __init__(self, fleet: Deployment, expected: dict[Prompt, tuple[int, ...]]) -> None:
        self.fleet = fleet
        self.expected = expected
        self.prompts = list(expected)
        self.engines = list(fleet.engines.values())
        self.node = self.engines[0].node
        self.counts: Counter[str] = Counter()
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._ends_s = time.monotonic() + STORM_S

    def run(self) -> None:
        """Even clients stay for all of their answers, odd ones for none."""
        calls: list[Callable[[], None]] = [self._remove_heads, self._kill_node]
        for number in range(NUM_CLIENTS):
            what = self._hang_up if number % 2 else self._stay
            calls.append(partial(self._client, what, random.Random(number)))
        at_once(partial(self._until_over, call) for call in calls)

    def _until_over(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException:
            self._over.set()
            raise

    def _goes_on(self, after_s: float = 0.0) -> bool:
        left_s = self._ends_s - time.monotonic()
        return not self._over.wait(max(min(after_s, left_s), 0.0)) and after_s < left_s

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def _client(self, act: Callable[[random.Random], None], rng: random.Random) -> None:
        while self._goes_on(rng.uniform(0.0, 0.2)):
            act(rng)

    def _stay(self, rng: random.Random) -> None:
        prompt, engine = rng.choice(self.prompts), rng.choice(self.engines)
        # A salt makes keys that nobody has stored, for tokens that the oracle has answered.
        extra = {"cache_salt": f"{rng.random()}"} if rng.random() < 0.1 else {}
        answer = engine.client.complete(prompt, max_tokens=MAX_TOKENS, **extra)
        assert answer.token_ids == self.expected[prompt], f"{engine.name}, {len(prompt)} tokens"
        self._count("stayed")

    def _hang_up(self, rng: random.Random) -> None:
        """While it waits, is looked up, loaded or computed; or after some of its tokens."""
        prompt, engine = rng.choice(self.prompts), rng.choice(self.engines)
        if rng.random() < 0.6:
            abandon(engine.client, prompt, after_s=rng.choice((0.05, 0.3, 2.0)) * rng.random())
            self._count("left early")
            return
        with asking(engine.client, prompt, max_tokens=MAX_TOKENS) as connection:
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            # An event may have several tokens: the answer may end sooner.
            for _ in range(rng.randrange(1, MAX_TOKENS)):
                if not answer.readline():
                    break
                answer.readline()
        self._count("left late")

    def _remove_heads(self) -> None:
        rng = random.Random("heads")
        while self._goes_on(HEAD_REMOVED_EVERY_S):
            files = self.fleet.store.files(rng.choice(self.prompts))
            for file in files[: rng.randrange(1, len(files))]:
                try:
                    os.unlink(file)
                except FileNotFoundError:
                    continue
                self._count("files removed")

    def _kill_node(self) -> None:
        while self._goes_on(KILLED_EVERY_S):
            self.node.wait("serving", lambda status: len(engines_of(status)) == 2)
            self.node.kill()
            self._count("node killed")


def test_clients_that_hang_up_while_heads_of_their_prompts_are_lost_end_no_engine_and_leak_nothing(
    stormy: Deployment, oracle: Oracle
) -> None:
    expected = oracle.answers(storm_prompts(), max_tokens=MAX_TOKENS)
    engines = list(stormy.engines.values())
    # Makes the namespace, in which heads are looked for.
    for engine in engines:
        for prompt in expected:
            check_answer(engine, prompt, expected[prompt])
    storm = Storm(stormy, expected)
    storm.run()

    check_nothing_is_left(storm)
    assert stormy.store.bad_files() == []
    for engine in engines:
        happened = what_happened(engine)
        assert all(happened.values()), f"{engine.name}: the storm must be harder: {happened}"
    wanted = {"stayed", "left early", "left late", "files removed", "node killed"}
    assert set(storm.counts) == wanted
    at_once(
        partial(check_answer, engine, prompt, expected[prompt])
        for engine in engines
        for prompt in expected
    )
    check_nothing_is_left(storm)


def test_clients_that_hang_up_while_tails_are_loaded_whose_heads_are_lost_end_no_engine(
    stormy: Deployment, oracle: Oracle
) -> None:
    """One after the other, and in the middle of it: whose head is to be stored while the tail is
    loaded. An engine that is told twice of such a request's end dies."""
    engine, expected = stormy["whole"], dict[Prompt, tuple[int, ...]]()
    rng = random.Random("tails")
    for round_ in range(ROUNDS):
        prompts = [make_prompt(1000, f"tail {round_} {i}") for i in range(TRIES)]
        expected |= oracle.answers(prompts, max_tokens=2)
        lose_heads(stormy, prompts, name=f"{round_}")
        first, *others = prompts
        before, asked_s = engine.client.counters(), time.monotonic()
        check_answer(engine, first, expected[first])
        answered_s = time.monotonic() - asked_s
        gained = counted(engine.client, before, len(first))
        assert (gained.local_hits, gained.external_hits) == (HEAD, 7 * 128 - HEAD)
        for prompt in others:
            abandon(engine.client, prompt, after_s=rng.uniform(0.0, answered_s))
        wait_until(partial(is_empty, engine), "nothing is left")
    for prompt in expected:
        check_answer(engine, prompt, expected[prompt])
    check_nothing_is_left(Storm(stormy, {}))


def lose_heads(fleet: Deployment, prompts: list[Prompt], *, name: str) -> None:
    """Afterwards their heads are in the engine's own cache alone, their tails in files alone."""
    engine = fleet["whole"]
    spares = [make_prompt(300, f"spare {name} {i}") for i in range(30)]
    for prompt in (*prompts, *spares):
        engine.client.complete(prompt, max_tokens=1)
    for i in range(8):  # for which the tails have to leave the engine's cache
        engine.client.complete(make_prompt(1500, f"filler {i}"), max_tokens=1)
    for prompt in prompts:
        engine.client.complete(prompt[: HEAD + 1], max_tokens=1)
    engine.node.wait_quiet()
    for prompt in prompts:
        for file in fleet.store.files(prompt)[: HEAD // 128]:
            os.unlink(file)
    engine.node.kill()
    engine.node.wait("serving", lambda status: len(engines_of(status)) == 2)
    # Each only once: what it has not loaded, it has computed, and keeps itself.
    wait_until(lambda: is_loaded(engine, spares.pop()), "it loads again")


def is_loaded(engine: Engine, prompt: Prompt) -> bool:
    before = engine.client.counters()
    engine.client.complete(prompt, max_tokens=1)
    return counted(engine.client, before, len(prompt)).external_hits > 0


def check_nothing_is_left(storm: Storm) -> None:
    for engine in storm.engines:
        assert engine.server.is_running and engine.server.answers(), engine.server.log_tail()
        assert engine.server.processes("VLLM::EngineCore")
        wait_until(partial(is_empty, engine), f"nothing is left in {engine.name}")
    status = storm.node.wait_quiet()
    assert len(engines_of(status)) == len(storm.engines)


def is_empty(engine: Engine) -> bool:
    samples = engine.client.metrics()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    for name in names:
        assert any(sample.startswith(f"vllm:{name}{{") for sample in samples), name
    return not any(total(samples, f"vllm:{name}") for name in names)


def what_happened(engine: Engine) -> dict[str, int]:
    counters = engine.client.counters()
    return {
        "preemptions": metric(engine.client, "vllm:num_preemptions_total"),
        "own hits": counters.local_hits,
        "loaded": counters.external_hits,
        "computed": counters.computed,
    }


def storm_prompts() -> list[Prompt]:
    """Families with common heads, and loners. All end just before a block does, so that their
    answers need another one."""
    found: list[Prompt] = []
    for family, num_blocks in enumerate((1, 2, 4, 7)):
        head = make_prompt(num_blocks * 128, f"storm family {family}")
        found += [
            head + make_prompt(128 * (2 + i % 3) - 10, f"storm member {family} {i}")
            for i in range(5)
        ]
    return found + [make_prompt(128 * i - 10, f"storm loner {i}") for i in (3, 4, 6, 12)]
