"""What prefill has promised decode loads, however soon it is asked: all of it, and the tail too."""

from __future__ import annotations

import json

import pytest

from tests.e2e.checks import counted, handed_over, handed_over_since, make_prompt
from tests.e2e.deployment import MAX_TOKENS, Deployment, Oracle
from tests.e2e.proxies import ONE_TO_ONE, proxy
from tests.e2e.races import race

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

# The decode engines load layer by layer and before the forward pass.
PLACES = {
    "one node": {"p1": "chunk512", "d1": "chunk512-layerwise"},
    "two nodes": {"p1": "chunk512-layerwise", "d1": "chunk4096"},
}


@pytest.mark.parametrize(
    ("handoff", "num_prompts", "place"),
    [
        ("chain", 100, "two nodes"),
        ("chain", 20, "one node"),
        ("overlap", 20, "two nodes"),
        ("overlap", 20, "one node"),
    ],
)
def test_decode_asked_at_once_loads_every_promised_token_of_every_prompt(
    float32_fleet: Deployment, oracle: Oracle, place: str, handoff: str, num_prompts: int
) -> None:
    salt = f"{place} {handoff} {num_prompts}"
    race(float32_fleet, oracle, PLACES[place], handoff, num_prompts=num_prompts, salt=salt)


@pytest.mark.parametrize("place", PLACES)
def test_of_a_prompt_of_any_length_decode_computes_one_token(
    float32_fleet: Deployment, oracle: Oracle, place: str
) -> None:
    decode = float32_fleet[PLACES[place]["d1"]]
    flags = f"{ONE_TO_ONE} --min-prefill-tokens 0"
    with proxy(float32_fleet, flags, PLACES[place]) as server:
        for length in (5, 127, 129, 1500, 3500):
            prompt = make_prompt(length, f"one token {place}")
            vllm_before, before = decode.client.counters(), handed_over(decode.client)
            answer = server.client.complete(prompt, max_tokens=MAX_TOKENS)
            assert answer.token_ids == oracle.answer(prompt)
            gained = handed_over_since(decode.client, before, length - 1)
            assert (gained.promised, gained.loaded) == (length - 1, length - 1)
            assert gained.recomputed == {}
            # Of a hit on the whole prompt vLLM computes the last token again, and doesn't say so.
            vllm = counted(decode.client, vllm_before, length)
            assert vllm.external_hits == decode.handed_over_tokens(prompt)
            assert vllm.computed == length - decode.handed_over_tokens(prompt)


@pytest.mark.parametrize("place", PLACES)
def test_a_prompt_of_one_token_is_answered_alone_and_beside_another_each_time_it_is_handed_over(
    float32_fleet: Deployment, oracle: Oracle, place: str
) -> None:
    one, other = make_prompt(1, f"alone {place}"), make_prompt(300, f"beside {place}")
    fields = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    with proxy(float32_fleet, f"{ONE_TO_ONE} --min-prefill-tokens 0", PLACES[place]) as server:
        for prompts in ([one], [one, other]) * 2:
            status, text = server.client.post(
                "/v1/completions", {"prompt": prompts, "return_token_ids": True, **fields}
            )
            assert status == 200, text
            answered = [tuple(choice["token_ids"]) for choice in json.loads(text)["choices"]]
            assert answered == [oracle.answer(prompt) for prompt in prompts]
            assert server.client.complete(one, max_tokens=MAX_TOKENS).token_ids == answered[0]
