"""A conversation stays where its pages lie in memory, and goes elsewhere when that is gone."""

from __future__ import annotations

import pytest

from tests.e2e.checks import Prompt, make_prompt, wait_until
from tests.e2e.deployment import MAX_TOKENS, Deployment, Oracle
from tests.e2e.proxies import PLACES, TWO_TO_TWO, proxy

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

TALKS, TURNS = 3, 3
OPENING, QUESTION = 600, 50


def test_a_conversation_stays_at_its_instances_and_goes_elsewhere_when_its_decode_is_killed(
    float32_fleet: Deployment, oracle: Oracle
) -> None:
    engines = {name: float32_fleet[PLACES[name]] for name in ("p1", "p2", "d1", "d2")}

    def asked() -> dict[str, int]:
        """How many tokens of prompts each engine has been asked for."""
        found = {name: engine.client.counters() for name, engine in engines.items()}
        return {name: each.external_queries for name, each in found.items()}

    with proxy(float32_fleet, f"{TWO_TO_TWO} --affinity prefix", PLACES) as server:

        def say(said: Prompt, *, legs: int) -> tuple[Prompt, set[str]]:
            """The conversation with its answer, and who was asked."""
            before = asked()
            answer = server.client.complete(said, max_tokens=MAX_TOKENS).token_ids
            assert answer == oracle.answer(said), len(said)

            def gained() -> dict[str, int]:
                return {name: now - before[name] for name, now in asked().items()}

            # vLLM answers first and counts then.
            wait_until(lambda: sum(gained().values()) >= legs * len(said), "it is counted")
            return (*said, *answer), {name for name, more in gained().items() if more}

        talks = [make_prompt(OPENING, f"affinity {i}") for i in range(TALKS)]
        homes: list[set[str]] = [set() for _ in talks]
        for turn in range(TURNS):
            for i, talk in enumerate(talks):
                said = (*talk, *make_prompt(QUESTION, f"turn {turn}"))
                talks[i], who = say(said, legs=2)
                homes[i] |= who
        for home in homes:
            assert sorted(name[0] for name in home) == ["d", "p"], homes
        kept = {
            role: server.client.metrics()[f'ucm_pd_affinity_total{{outcome="kept",role="{role}"}}']
            for role in ("prefill", "decode")
        }
        assert kept == dict.fromkeys(kept, TALKS * (TURNS - 1))

        (decode,) = homes[0] & {"d1", "d2"}
        (other,) = {"d1", "d2"} - {decode}
        killed = engines.pop(decode)
        killed.server.kill()
        try:
            for turn in range(2):
                said = (*talks[0], *make_prompt(QUESTION, f"after {turn}"))
                talks[0], who = say(said, legs=2)
                assert who == (homes[0] - {decode}) | {other}
        finally:
            float32_fleet.start_again(killed.name)
            float32_fleet.wait_ready()
