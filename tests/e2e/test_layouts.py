"""Engines that cut their KV differently share blocks; those whose bytes can't be compared don't."""

from __future__ import annotations

import pytest

from tests.e2e.checks import check_answer, check_loaded, counted, make_prompt
from tests.e2e.deployment import Deployment, Oracle

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LENGTHS = (128, 129, 1500)


@pytest.mark.parametrize(
    ("producer", "consumer"),
    [
        ("tp2", "plain"),
        ("plain", "tp2"),
        ("block64", "plain"),
        ("plain", "block64"),
        ("block32", "plain"),
        ("plain", "block32"),
        ("tp2", "block64"),
    ],
)
def test_engines_of_other_tensor_parallelism_and_block_size_share_blocks_and_agree(
    unlike_fleet: Deployment, oracle: Oracle, producer: str, consumer: str
) -> None:
    for length in LENGTHS:
        prompt = make_prompt(length, f"layouts {producer} {consumer}")
        expected = oracle.answer(prompt)
        check_answer(unlike_fleet[producer], prompt, expected)
        unlike_fleet.store.wait_stored(prompt)
        check_loaded(unlike_fleet[consumer], prompt, expected)
    assert unlike_fleet.store.bad_files() == []


def test_a_local_hit_that_ends_inside_a_block_is_continued_from_the_store(
    unlike_fleet: Deployment, oracle: Oracle
) -> None:
    engine = unlike_fleet["block32"]
    prompt = make_prompt(1500, "inside a block")
    check_answer(unlike_fleet["plain"], prompt, oracle.answer(prompt))
    unlike_fleet.store.wait_stored(prompt)
    # Six blocks of 32 into its own prefix cache, and nothing of them into the store.
    start = (*prompt[:200], 5)
    check_answer(engine, prompt[:127], oracle.answer(prompt[:127]))
    check_answer(engine, start, oracle.answer(start))
    before = engine.client.counters()
    check_answer(engine, prompt, oracle.answer(prompt))
    gained = counted(engine.client, before, len(prompt))
    assert (gained.local_hits, gained.external_hits) == (192, 1408 - 192)


def test_a_layout_declared_opaque_has_its_own_namespace_and_shares_only_with_its_like(
    unlike_fleet: Deployment, oracle: Oracle
) -> None:
    plain, opaque = unlike_fleet["plain"], unlike_fleet["opaque"]
    for producer, consumer, layout in (
        (plain, opaque, "canonical"),
        (opaque, plain, "opaque:cpu:"),
    ):
        prompt = make_prompt(1500, f"opaque {producer.name}")
        expected = oracle.answer(prompt)
        check_answer(producer, prompt, expected)
        unlike_fleet.store.wait_stored(prompt, layout)
        check_loaded(consumer, prompt, expected, hit_tokens=0)
        check_loaded(producer, prompt, expected)
    assert unlike_fleet.store.namespace("canonical") != unlike_fleet.store.namespace("opaque:cpu:")
