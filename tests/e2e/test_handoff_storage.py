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
    counted,
    handed_over,
    handed_over_since,
    make_prompt,
    wait_until,
)
from tests.e2e.deployment import Deployment, Engine, Oracle
from tests.e2e.node import Node, is_alive
from tests.e2e.races import NUM_ANSWERED, RACING
from tests.faults.fuse import FuseMount, mount_fuse, needs_fuse
from ucm.errors import UcmError
from ucm.handoff import Wanted, params

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600), needs_fuse]

SLOW_S = 0.2
# What one prompt's pages need of the slow mount takes seconds: many threads do it for many prompts.
NUM_WRITERS = 64
NUM_CLIENTS = 6
# A hundred take minutes: UCM_TEST_HANDOFFS=100.
SOME = RACING[: int(os.environ.get("UCM_TEST_HANDOFFS", "24"))]
FORGET_S = 30.0


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
        mount_fuse(store, folder / "forgetful", negative_timeout_s=FORGET_S) as forgetful,
    ):
        started = [
            fleet.start(
                "slow", Node("slow", mounted_at=slow.path, posix_write_threads=NUM_WRITERS)
            ),
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


def prefill(engine: Engine, prompt: Prompt, **extra: str) -> object:
    """What the engine says of the prompt for decode."""
    receipt = engine.client.prefill(prompt, params=params(Wanted()), **extra)
    assert receipt
    return receipt


def decode(engine: Engine, prompt: Prompt, receipt: object, **extra: str) -> tuple[int, ...]:
    answer = engine.client.complete(
        prompt, max_tokens=NUM_ANSWERED, kv_transfer_params=receipt, **extra
    )
    return answer.token_ids


def hand_over_all(
    producer: Engine,
    consumer: Engine,
    oracle: Oracle,
    *,
    before_each: Callable[[Prompt], None] = lambda prompt: None,
    **extra: str,
) -> None:
    """By some clients at once. Everything that was promised is loaded, and the tokens are right."""
    expected = oracle.answers(SOME, max_tokens=NUM_ANSWERED)
    before = Before.now(consumer)

    def client(mine: list[Prompt]) -> None:
        for prompt in mine:
            before_each(prompt)
            receipt = prefill(producer, prompt, **extra)
            assert decode(consumer, prompt, receipt, **extra) == expected[prompt]

    at_once(partial(client, SOME[i::NUM_CLIENTS]) for i in range(NUM_CLIENTS))
    before.check_all_loaded(SOME)


def test_all_that_was_promised_is_loaded_where_prefills_files_come_late(
    faulty: Faulty, oracle: Oracle
) -> None:
    renames = faulty.slow_mount.calls["rename"]
    # With the salt they are new to the store.
    hand_over_all(faulty.slow, faulty.fleet["chunk4096"], oracle, cache_salt="late")
    assert faulty.slow_mount.calls["rename"] - renames >= 12 * len(SOME)


def test_all_that_was_promised_is_loaded_where_decodes_kernel_remembers_it_as_missing(
    faulty: Faulty, oracle: Oracle
) -> None:
    producer, consumer, mount = faulty.fleet["chunk512"], faulty.forgetful, faulty.forgetful_mount

    def are_seen(prompt: Prompt) -> list[bool]:
        return [seen_by(mount, file).exists() for file in faulty.fleet.store.files(prompt)]

    def miss(prompt: Prompt) -> None:
        assert not any(are_seen(prompt))

    hand_over_all(producer, consumer, oracle, before_each=miss)
    # And one that is all there, and of which much is said to be missing all the same.
    prompt = make_prompt(1500, "missed before")
    expected = oracle.answer(prompt, max_tokens=NUM_ANSWERED)
    miss(prompt)
    before = Before.now(consumer)
    receipt = prefill(producer, prompt)
    faulty.fleet.store.wait_stored(prompt)
    assert not all(are_seen(prompt))
    assert decode(consumer, prompt, receipt) == expected
    before.check_all_loaded([prompt])


def seen_by(mount: FuseMount, file: Path) -> Path:
    return mount.path / file.relative_to(mount.source)


def test_what_was_lost_with_prefills_node_cache_decode_computes_and_counts_as_late(
    faulty: Faulty, oracle: Oracle
) -> None:
    prompts = [make_prompt(1500, f"lost {i}") for i in range(2)]
    expected = oracle.answers(prompts, max_tokens=NUM_ANSWERED)
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
    # As every writer that is killed it has left its temporary files, which others will look for.
    for file in faulty.fleet.store.unfinished():
        file.unlink()
