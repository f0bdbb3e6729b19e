"""Hits that take longer than computing: real engines find out, and leave them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import pytest

from examples.cluster.client import by_label
from tests.e2e.checks import (
    Prompt,
    check_answer,
    check_loaded,
    make_prompt,
    missed_blocks,
    wait_until,
)
from tests.e2e.conftest import DeploymentMaker
from tests.e2e.deployment import Deployment, Engine, Fleets, Oracle
from tests.e2e.node import Node
from tests.faults.fuse import mount_fuse, needs_fuse
from ucm.errors import UcmError
from ucm.integration.engine.rates import MIN_SAMPLES

pytestmark = [pytest.mark.long, pytest.mark.vllm, pytest.mark.timeout(600), needs_fuse]

# A page is read in several reads; eight threads read at once.
SLOW_S = 0.3
# Long enough for a prefill that says how fast one is, and some of these to be sure of it.
MEASURED = [make_prompt(2000, f"measures {i}") for i in range(6)]
SMALL = [make_prompt(300, f"small hit {i}") for i in range(6)]
LARGE = [make_prompt(3500, f"large hit {i}") for i in range(3)]
BLOCKS_OF_LARGE = 27


@dataclass(frozen=True)
class Decoders:
    """Two that only load, `slow` through a mount whose reads take long. Neither has seen a prompt
    that lies in the store."""

    deployment: Deployment

    @property
    def fast(self) -> Engine:
        return self.deployment["fast"]

    @property
    def slow(self) -> Engine:
        return self.deployment["slow"]


@pytest.fixture(scope="module")
def decoders(
    fleets: Fleets,
    deployment: DeploymentMaker,
    started_oracle: Oracle,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Decoders]:
    fleets.end()
    folder = tmp_path_factory.mktemp("slow-reads")
    with deployment("load-policy") as made:
        started_oracle.server.wait_ready()
        with mount_fuse(made.store.folder, folder / "slow", delays_s={"read": SLOW_S}) as mount:
            made.start("prefill", Node("policy-prefill"), role="kv_producer")
            auto = {"role": "kv_consumer", "load_policy": "auto"}
            made.start("fast", Node("policy-fast"), **auto)
            slow = made.start("slow", Node("policy-slow", mounted_at=mount.path), **auto)
            made.wait_ready()
            for prompt in [*SMALL, *LARGE]:
                check_answer(made["prefill"], prompt, started_oracle.answer(prompt))
                made.store.wait_stored(prompt)
            yield Decoders(made)
            mount.release()
            slow.server.kill()
            with suppress(UcmError):
                slow.node.kill()


def learn(engine: Engine, oracle: Oracle) -> None:
    """How fast it computes, and how fast it loads, with the right tokens all the while."""
    for prompt in [*MEASURED, *SMALL]:
        check_answer(engine, prompt, oracle.answer(prompt))


def refused(engine: Engine) -> int:
    """Blocks that were not worth their load."""
    return missed_blocks(engine.client)["not_worth"]


def check_all(engine: Engine, prompts: list[Prompt], oracle: Oracle, *, hit_tokens: int) -> None:
    for prompt in prompts:
        check_loaded(engine, prompt, oracle.answer(prompt), hit_tokens=hit_tokens)


def test_from_fast_files_everything_is_loaded_however_much_is_known(
    decoders: Decoders, oracle: Oracle
) -> None:
    learn(decoders.fast, oracle)

    check_all(decoders.fast, LARGE, oracle, hit_tokens=BLOCKS_OF_LARGE * 128)

    assert refused(decoders.fast) == 0
    speeds = by_label(decoders.fast.client.metrics(), "ucm_estimated_tokens_per_second", "of")
    assert speeds["files"] > speeds["compute"] > 0


def test_from_slow_files_nothing_is_loaded_once_that_is_known_and_it_is_counted(
    decoders: Decoders, oracle: Oracle
) -> None:
    learn(decoders.slow, oracle)
    # Of the small hits, once it was known: two blocks each.
    wait_until(lambda: refused(decoders.slow) >= 2 * (len(SMALL) - MIN_SAMPLES), "counted")
    before = refused(decoders.slow)

    check_all(decoders.slow, LARGE, oracle, hit_tokens=0)

    wanted = before + len(LARGE) * BLOCKS_OF_LARGE
    wait_until(lambda: refused(decoders.slow) >= wanted, "all are counted")
    assert refused(decoders.slow) == wanted
