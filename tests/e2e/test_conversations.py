"""A conversation: what decode has answered is a part of the next prompt, and is loaded as the
rest is."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.e2e.checks import counted, make_prompt
from tests.e2e.conftest import DeploymentMaker
from tests.e2e.deployment import Deployment, Oracle
from tests.e2e.node import Node
from tests.e2e.proxies import ONE_TO_ONE, proxy
from tests.e2e.store import BLOCK_TOKENS
from tests.e2e.talks import (
    ANSWER,
    QUESTION,
    TURNS,
    check_little_is_computed,
    computed_by_turn,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

KNOWN_TURNS = 6


@pytest.fixture(scope="module")
def fleet(deployment: DeploymentMaker, started_oracle: Oracle) -> Iterator[Deployment]:
    """`silent` stores no answers."""
    made = deployment("conversations")
    one, two = Node("talk-one"), Node("talk-two")
    made.start("prefill", one)
    made.start("decode", two)
    made.start("silent", two, store_generated=False)
    with made:
        made.wait_ready()
        yield made


def test_from_the_second_turn_on_prefill_computes_a_block_and_what_is_new(
    fleet: Deployment, oracle: Oracle
) -> None:
    check_little_is_computed(computed_by_turn(fleet, oracle, "decode", "kept"))


def test_without_store_generated_prefill_computes_every_answer_again(
    fleet: Deployment, oracle: Oracle
) -> None:
    found = computed_by_turn(fleet, oracle, "silent", "lost")

    assert all(prefilled > ANSWER for prefilled, _ in found[1:]), found
    lost = sum(prefilled for prefilled, _ in found[1:])
    assert lost >= (TURNS - 1) * (QUESTION + ANSWER - BLOCK_TOKENS)


@pytest.mark.parametrize("decoder", ["decode", "silent"])
def test_prefill_is_left_out_from_the_second_turn_on_if_answers_are_kept(
    fleet: Deployment, oracle: Oracle, decoder: str
) -> None:
    flags = f"{ONE_TO_ONE} --known-for-s 1000 --max-new-tokens {QUESTION + BLOCK_TOKENS}"
    prefill, decode = fleet["prefill"], fleet[decoder]
    found: list[tuple[int, int]] = []
    said = make_prompt(300, f"known {decoder}")
    with proxy(fleet, flags, {"p1": "prefill", "d1": decoder}) as server:
        for turn in range(KNOWN_TURNS):
            before = prefill.client.counters(), decode.client.counters()
            # Of a stream decode doesn't say what is stored.
            fields = {"prompt": said, "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True}
            body = {**fields, "return_token_ids": True}
            status, text = server.client.post("/v1/completions", body)
            assert status == 200, text
            answer = tuple(json.loads(text)["choices"][0]["token_ids"])
            assert answer == oracle.answer(said, max_tokens=ANSWER), f"turn {turn}"
            decoded = counted(decode.client, before[1], len(said)).computed
            asked = prefill.client.counters() - before[0]
            found.append((asked.external_queries, decoded))
            said = (*said, *answer, *make_prompt(QUESTION, f"{decoder} {turn}"))
        known = server.client.metrics().get('ucm_pd_not_prefilled_total{reason="known"}', 0)

    if decoder == "silent":
        assert known == 0 and all(asked for asked, _ in found), found
        return
    assert known == KNOWN_TURNS - 1, found
    for asked_prefill, decoded in found[1:]:
        assert asked_prefill == 0, found
        assert decoded <= QUESTION + BLOCK_TOKENS, found
