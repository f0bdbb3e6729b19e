"""A conversation: what decode has answered is a part of the next prompt, and is loaded as the
rest is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.checks import Prompt, counted, make_prompt
from tests.e2e.conftest import DeploymentMaker
from tests.e2e.deployment import Deployment, Oracle
from tests.e2e.node import Node
from tests.e2e.proxies import ONE_TO_ONE, proxy
from tests.e2e.store import BLOCK_TOKENS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

TURNS = 10
QUESTION, ANSWER = 60, 150


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


def _computed_by_turn(
    fleet: Deployment, oracle: Oracle, decoder: str, name: str
) -> list[tuple[int, int]]:
    """Of each turn, how many tokens of its prompt prefill and decode have computed."""
    places = {"p1": "prefill", "d1": decoder}
    prefill, decode = fleet["prefill"], fleet[decoder]
    found = []
    said: Prompt = ()
    with proxy(fleet, f"{ONE_TO_ONE} --min-prefill-tokens 0", places) as server:
        for turn in range(TURNS):
            said = (*said, *make_prompt(QUESTION, f"{name} {turn}"))
            before = prefill.client.counters(), decode.client.counters()
            answer = server.client.complete(said, max_tokens=ANSWER).token_ids
            assert answer == oracle.answer(said, max_tokens=ANSWER), f"turn {turn}"
            gained = [
                counted(engine.client, of_engine, len(said))
                for engine, of_engine in zip((prefill, decode), before, strict=True)
            ]
            # Of a hit on the whole prompt vLLM computes the last token again, and doesn't say so.
            found.append((gained[0].computed, gained[1].computed))
            said = (*said, *answer)
    return found


def test_from_the_second_turn_on_prefill_computes_a_block_and_what_is_new(
    fleet: Deployment, oracle: Oracle
) -> None:
    found = _computed_by_turn(fleet, oracle, "decode", "kept")

    for turn, (prefilled, decoded) in enumerate(found):
        assert decoded <= 1, (turn, found)
        if turn:
            assert prefilled <= BLOCK_TOKENS + QUESTION, (turn, found)


def test_without_store_generated_prefill_computes_every_answer_again(
    fleet: Deployment, oracle: Oracle
) -> None:
    found = _computed_by_turn(fleet, oracle, "silent", "lost")

    assert all(prefilled > ANSWER for prefilled, _ in found[1:]), found
    lost = sum(prefilled for prefilled, _ in found[1:])
    assert lost >= (TURNS - 1) * (QUESTION + ANSWER - BLOCK_TOKENS)
