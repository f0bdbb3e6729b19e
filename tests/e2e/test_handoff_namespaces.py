"""A receipt of another namespace costs nothing but the time to compute, and the log says why."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.e2e.checks import (
    check_answer,
    check_loaded,
    handed_over,
    handed_over_since,
    make_prompt,
    wait_until,
)
from tests.e2e.deployment import MAX_TOKENS, Deployment, Engine, Oracle
from tests.e2e.proxies import ONE_TO_ONE, proxy
from tests.e2e.store import BLOCK_TOKENS
from ucm.handoff import Wanted, params

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def wait_logged(engine: Engine, words: str) -> None:
    """In one line that refuses receipts."""

    def is_logged() -> bool:
        lines = engine.server.log_text().splitlines()
        return any("receipts of namespace" in line and words in line for line in lines)

    wait_until(is_logged, f"{engine.name} logs: {words}")


def promised_tokens(deployment: Deployment, prefill: str, prompt: Sequence[int]) -> int:
    """All but the last, which decode computes; of a layout that is opaque, as vLLM's is for
    bfloat16 on processors with AMX, whole blocks, because it has no tails."""
    if prefill == "bfloat16":
        store = deployment.store.of("bfloat16")
        store.wait_stored(prompt, "")
        if store.namespace("").layout.startswith("opaque"):
            return len(prompt) // BLOCK_TOKENS * BLOCK_TOKENS
    return len(prompt) - 1


@pytest.mark.parametrize(
    ("prefill", "decode", "says"),
    [
        ("bfloat16", "plain", "kv_dtype: bfloat16 (prefill) / float32 (here)"),
        ("plain", "bfloat16-layerwise", "kv_dtype: float32 (prefill) / bfloat16 (here)"),
    ],
)
def test_decode_of_another_dtype_answers_and_names_the_field_in_which_they_differ(
    unlike_fleet: Deployment, prefill: str, decode: str, says: str
) -> None:
    consumer = unlike_fleet[decode]
    # Its own answer to the prompt while nobody has stored it.
    prompt = make_prompt(1500, f"to {decode}")
    alone = consumer.client.complete(prompt, max_tokens=MAX_TOKENS, cache_salt="alone")
    before = handed_over(consumer.client)
    with proxy(unlike_fleet, ONE_TO_ONE, {"p1": prefill, "d1": decode}) as server:
        answer = server.client.complete(prompt, max_tokens=MAX_TOKENS)
    assert answer.token_ids == alone.token_ids
    promised = promised_tokens(unlike_fleet, prefill, prompt)
    gained = handed_over_since(consumer.client, before, promised)
    assert (gained.promised, gained.loaded) == (promised, 0)
    assert gained.recomputed == {"namespace": promised}
    assert gained.receipts == {"refused_namespace": 1}
    wait_logged(consumer, says)


def test_after_a_reset_of_the_cache_nothing_that_was_stored_or_promised_before_is_loaded(
    unlike_fleet: Deployment, oracle: Oracle
) -> None:
    engine = unlike_fleet["plain"]
    client = engine.client
    prompt = make_prompt(1500, "before the reset")
    expected = oracle.answer(prompt)
    receipt = client.prefill(prompt, params=params(Wanted()))
    assert receipt
    engine.node.wait_quiet()
    check_loaded(engine, prompt, expected)

    status, body = client.post("/reset_prefix_cache?reset_external=true", {})
    assert (status, body) == (200, '{"success":true}')
    before = handed_over(client)
    late = client.complete(prompt, max_tokens=len(expected), kv_transfer_params=receipt)
    assert late.token_ids == expected
    gained = handed_over_since(client, before, 1499)
    assert gained.recomputed == {"namespace": 1499}
    wait_logged(engine, "epoch: 0 (prefill)")
    # What it stores from now on it finds again.
    later = make_prompt(1500, "after the reset")
    check_answer(engine, later, oracle.answer(later))
    engine.node.wait_quiet()
    check_loaded(engine, later, oracle.answer(later))
