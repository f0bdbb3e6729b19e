"""Hand-offs over storage that is slow to show what was written, or that remembers it as missing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from examples.cluster.client import Counters
from tests.e2e.checks import (
    HandedOver,
    Prompt,
    at_once,
    check_answer,
    counted,
    handed_over,
    handed_over_since,
    make_prompt,
    wait_until,
)
from tests.e2e.deployment import MAX_TOKENS, Deployment, Engine, Oracle
from tests.e2e.node import Node, is_alive
from tests.faults.fuse import FuseMount, mount_fuse, needs_fuse
from ucm.errors import UcmError
from ucm.handoff import Wanted, params

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), needs_fuse]

SLOW_S = 0.2
NUM_PROMPTS = 10


@dataclass(frozen=True)
class Faulty:
    """The float32 fleet, and two engines that see its store through mounts of their own: `slow`
    prefills, and writes and names of it take longer; `forgetful` only decodes, and what it has once
    missed its kernel says to be missing."""

    fleet: Deployment
    slow_mount: FuseMount
    forgetful_mount: FuseMount

    @property
    def slow(self) -> Engine:
        return self.fleet["slow"]

    @property
    def forgetful(self) -> Engine:
        return self.fleet["forgetful"]


@pytest.fixture(scope="module")
def faulty(
    use_float32: Callable[[], Deployment], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Faulty]:
    fleet, folder = use_float32(), tmp_path_factory.mktemp("mounts")
    store = fleet.store.folder
    delays_s = {"write": SLOW_S, "rename": SLOW_S}
    with (
        mount_fuse(store, folder / "slow", delays_s=delays_s) as slow,
        mount_fuse(store, folder / "forgetful", negative_timeout_s=30.0) as forgetful,
    ):
        started = [
            fleet.start("slow", Node("slow", mounted_at=slow.path)),
            fleet.start(
                "forgetful", Node("forgetful", mounted_at=forgetful.path), role="kv_consumer"
            ),
        ]
        try:
            fleet.wait_ready()
            yield Faulty(fleet, slow, forgetful)
        finally:
            slow.release()
            for engine in started:
                del fleet.engines[engine.name]
                engine.server.kill()
                with suppress(UcmError):
                    engine.node.kill()


@dataclass(frozen=True)
class Before:
    """A decode engine's counters."""

    engine: Engine
    vllm: Counters
    handed_over: HandedOver

    @classmethod
    def now(cls, engine: Engine) -> Before:
        return cls(engine, engine.client.counters(), handed_over(engine.client))

    def check_all_loaded(self, prompts: list[Prompt]) -> None:
        """That since then these were handed over, and loaded but for the last token of each."""
        promised = sum(len(prompt) - 1 for prompt in prompts)
        gained = handed_over_since(self.engine.client, self.handed_over, promised)
        assert (gained.promised, gained.loaded, gained.recomputed) == (promised, promised, {})
        vllm = counted(self.engine.client, self.vllm, sum(map(len, prompts)))
        assert vllm.external_hits == sum(map(self.engine.handed_over_tokens, prompts))


def prefill(engine: Engine, prompt: Prompt) -> object:
    """What the engine says of the prompt for decode."""
    receipt = engine.client.prefill(prompt, params=params(Wanted()))
    assert receipt
    return receipt


def decode(engine: Engine, prompt: Prompt, receipt: object) -> tuple[int, ...]:
    answer = engine.client.complete(prompt, max_tokens=MAX_TOKENS, kv_transfer_params=receipt)
    return answer.token_ids


def test_all_that_was_promised_is_loaded_where_prefills_files_come_late(
    faulty: Faulty, oracle: Oracle
) -> None:
    prompts = [make_prompt(1500, f"late files {i}") for i in range(NUM_PROMPTS)]
    expected = oracle.answers(prompts)
    consumer = faulty.fleet["chunk4096"]
    before = Before.now(consumer)
    renames = faulty.slow_mount.calls["rename"]
    for prompt in prompts:
        assert decode(consumer, prompt, prefill(faulty.slow, prompt)) == expected[prompt]
    before.check_all_loaded(prompts)
    assert faulty.slow_mount.calls["rename"] - renames >= NUM_PROMPTS * 12


def test_all_that_was_promised_is_loaded_where_decodes_kernel_remembers_it_as_missing(
    faulty: Faulty, oracle: Oracle
) -> None:
    prompts = [make_prompt(1500, f"missed before {i}") for i in range(NUM_PROMPTS)]
    expected = oracle.answers(prompts)
    producer, consumer = faulty.fleet["chunk512"], faulty.forgetful
    for prompt in prompts:
        check_answer(consumer, prompt, expected[prompt])
    before = Before.now(consumer)
    for prompt in prompts[1:]:
        assert decode(consumer, prompt, prefill(producer, prompt)) == expected[prompt]
    # One of them once it is all there, and said to be missing all the same.
    receipt = prefill(producer, prompts[0])
    faulty.fleet.store.wait_stored(prompts[0])
    file = faulty.fleet.store.files(prompts[0])[0]
    assert file.exists()
    assert not seen_by(faulty.forgetful_mount, file).exists()
    assert decode(consumer, prompts[0], receipt) == expected[prompts[0]]
    before.check_all_loaded(prompts)


def seen_by(mount: FuseMount, file: Path) -> Path:
    return mount.path / file.relative_to(mount.source)


def test_what_was_lost_with_prefills_node_cache_decode_computes_and_counts_as_late(
    faulty: Faulty, oracle: Oracle
) -> None:
    prompts = [make_prompt(1500, f"lost {i}") for i in range(2)]
    expected = oracle.answers(prompts)
    consumer, mount = faulty.forgetful, faulty.slow_mount
    before = handed_over(consumer.client)
    mount.hang("write")
    receipts = [prefill(faulty.slow, prompt) for prompt in prompts]
    pid = faulty.slow.node.status().pid
    os.kill(pid, signal.SIGKILL)
    # What waits in the mount can't be killed before it returns.
    mount.release()
    wait_until(lambda: not is_alive(pid), "prefill's node cache is gone")
    answers = at_once(
        partial(decode, consumer, prompt, receipt)
        for prompt, receipt in zip(prompts, receipts, strict=True)
    )
    assert answers == [expected[prompt] for prompt in prompts]
    gained = handed_over_since(consumer.client, before, 2 * 1499)
    assert (gained.loaded, gained.recomputed) == (0, {"late": 2 * 1499})
    assert not any(file.exists() for prompt in prompts for file in faulty.fleet.store.files(prompt))
