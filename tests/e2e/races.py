"""Decode is asked in the moment in which prefill has answered, for many prompts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from examples.cluster.processes import HttpServer
from tests.e2e.checks import Prompt, at_once, counted, handed_over, handed_over_since, make_prompt
from tests.e2e.deployment import Deployment, Oracle
from tests.e2e.proxies import ONE_TO_ONE, proxy

_NUM_CLIENTS = 4
NUM_ANSWERED = 4
RACING = [make_prompt(1500, f"race {i}") for i in range(100)]


def race(
    fleet: Deployment,
    oracle: Oracle,
    places: Mapping[str, str],
    handoff: str,
    *,
    num_prompts: int,
    salt: str,
) -> None:
    """Every answer is right, and every promised token of every prompt was loaded. `salt` makes keys
    that nobody has stored, for tokens that the oracle has answered."""
    prompts = RACING[:num_prompts]
    expected = oracle.answers(prompts, max_tokens=NUM_ANSWERED)
    decode = fleet[places["d1"]]
    vllm_before, before = decode.client.counters(), handed_over(decode.client)

    def client(server: HttpServer, mine: list[Prompt]) -> None:
        for prompt in mine:
            answer = server.client.complete(prompt, max_tokens=NUM_ANSWERED, cache_salt=salt)
            assert answer.token_ids == expected[prompt]

    with proxy(fleet, f"{ONE_TO_ONE} --handoff {handoff}", places) as server:
        at_once(partial(client, server, prompts[i::_NUM_CLIENTS]) for i in range(_NUM_CLIENTS))
    promised = num_prompts * 1499
    gained = handed_over_since(decode.client, before, promised)
    assert (gained.promised, gained.loaded, gained.recomputed) == (promised, promised, {}), gained
    assert gained.receipts == ({"taken": num_prompts} if handoff == "chain" else {})
    hits = counted(decode.client, vllm_before, num_prompts * 1500).external_hits
    assert hits == num_prompts * decode.handed_over_tokens(prompts[0])
