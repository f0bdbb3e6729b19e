"""The tokens of a prompt whose KV came from the store are those of a cold monolithic vLLM."""

from __future__ import annotations

import pytest

from tests.e2e.checks import LENGTHS, check_all_load, check_answer, check_loaded, make_prompt
from tests.e2e.deployment import Deployment, Oracle
from tests.e2e.store import Namespace

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

ENGINES = ("chunk512", "chunk512-layerwise", "chunk4096", "chunk4096-layerwise")


@pytest.mark.parametrize("producer", ENGINES)
def test_what_an_engine_stores_every_engine_loads_and_answers_like_a_cold_monolith(
    float32_fleet: Deployment, oracle: Oracle, producer: str
) -> None:
    """The producer itself too: it has no prefix cache. Engines of its node load from shared memory,
    the others from files."""
    for length in LENGTHS:
        prompt = make_prompt(length, f"identity {producer}")
        expected = oracle.answer(prompt)
        check_answer(float32_fleet[producer], prompt, expected)
        float32_fleet.store.wait_stored(prompt)
        check_all_load(float32_fleet.engines.values(), prompt, expected)
    assert float32_fleet.store.bad_files() == []


@pytest.mark.parametrize("consumer", ["chunk4096", "chunk4096-layerwise"])
def test_the_identity_test_fails_when_one_byte_of_a_page_changes_after_its_verification(
    float32_fleet: Deployment, oracle: Oracle, consumer: str
) -> None:
    prompt = make_prompt(1500, f"control {consumer}")
    expected = oracle.answer(prompt)
    check_answer(float32_fleet["chunk512"], prompt, expected)
    store, engine = float32_fleet.store, float32_fleet[consumer]
    store.wait_stored(prompt)
    namespace = store.namespace()
    with engine.node.pages(namespace, namespace.keys(prompt)) as pages:
        place = exponent_byte(namespace, pages[4])
        pages[4][place] ^= 0x40
        with pytest.raises(AssertionError, match="tokens of"):
            check_loaded(engine, prompt, expected)
        pages[4][place] ^= 0x40
        check_loaded(engine, prompt, expected)


def exponent_byte(namespace: Namespace, page: memoryview) -> int:
    """The highest byte of a small float32 in the second half of the page, where flipping 0x40 makes
    it huge."""
    page_bytes = namespace.page_bytes
    return next(i for i in range(page_bytes // 2 + 3, page_bytes, 4) if not page[i] & 0x40)
