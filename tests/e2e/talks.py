"""A conversation of several turns through the proxy, and where the tokens of its prompts came
from."""

from __future__ import annotations

from tests.e2e.checks import Prompt, counted, make_prompt
from tests.e2e.deployment import Deployment, Oracle
from tests.e2e.proxies import ONE_TO_ONE, proxy
from tests.e2e.store import BLOCK_TOKENS

TURNS = 10
QUESTION, ANSWER = 60, 150


def computed_by_turn(
    fleet: Deployment, oracle: Oracle, decoder: str, name: str, *, flags: str = ""
) -> list[tuple[int, int]]:
    """Of each turn, how many tokens of its prompt prefill and decode have computed."""
    places = {"p1": "prefill", "d1": decoder}
    prefill, decode = fleet["prefill"], fleet[decoder]
    found = []
    said: Prompt = ()
    with proxy(fleet, f"{ONE_TO_ONE} --min-prefill-tokens 0 {flags}", places) as server:
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


def check_little_is_computed(found: list[tuple[int, int]]) -> None:
    """By prefill at most a block and the question from the second turn on, by decode a token."""
    for turn, (prefilled, decoded) in enumerate(found):
        assert decoded <= 1, (turn, found)
        if turn:
            assert prefilled <= BLOCK_TOKENS + QUESTION, (turn, found)
