"""Answers of every kind are stored as far as they are right, and no further: guessed, preempted,
sampled, stopped, hung up on, and killed in the middle."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from examples.cluster.client import Client
from examples.cluster.processes import MIB
from tests.e2e.checks import (
    Prompt,
    asking,
    at_once,
    check_answer,
    check_loaded,
    counted,
    make_prompt,
    metric,
)
from tests.e2e.conftest import DeploymentMaker
from tests.e2e.deployment import Deployment, Engine, Oracle
from tests.e2e.node import Node
from tests.e2e.proxies import ONE_TO_ONE, proxy
from tests.e2e.store import BLOCK_TOKENS
from tests.e2e.talks import check_little_is_computed, computed_by_turn
from tests.e2e.test_drafts import NGRAM, wrong_guesses

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(900)]

ANSWER = 300
# Of which the prompt has 2 and the answer 2 or 3.
PROMPT = 2 * BLOCK_TOKENS + 100
# Room for the longest conversation of this file, and little more.
CRAMPED_TOKENS = 18 * BLOCK_TOKENS
CRAMPED_BYTES = 10 * MIB
NUM_USERS, TURNS = 12, 3
TWO_DECODERS = (
    "--pd-disaggregation --host localhost --port $port --prefiller-host 127.0.0.1"
    " --prefiller-port $p1 --decoder-hosts 127.0.0.1 127.0.0.1 --decoder-ports $d1 $d2"
)


@pytest.fixture(scope="module")
def fleet(deployment: DeploymentMaker, started_oracle: Oracle) -> Iterator[Deployment]:
    """`cramped` computes in small chunks and preempts, `guessing` guesses, `ending` stores an
    answer when it ends."""
    made = deployment("kept")
    one, two = Node("kept-one"), Node("kept-two")
    guess = ["--speculative-config", json.dumps(NGRAM)]
    made.start("prefill", one)
    short = ["--max-model-len", str(CRAMPED_TOKENS)]
    made.start("cramped", two, chunk=256, kv_cache_bytes=CRAMPED_BYTES, args=short)
    made.start("guessing", two, args=guess)
    made.start("ending", two, store_generated="end")
    with made:
        made.wait_ready()
        yield made


@pytest.mark.parametrize(
    ("decoder", "flags"),
    [("cramped", "--handoff overlap"), ("guessing", ""), ("ending", "")],
)
def test_from_the_second_turn_on_little_is_computed_whoever_decodes_and_however_it_is_handed_over(
    fleet: Deployment, oracle: Oracle, decoder: str, flags: str
) -> None:
    name = f"{decoder} {flags}"
    check_little_is_computed(computed_by_turn(fleet, oracle, decoder, name, flags=flags))


@pytest.mark.parametrize("decoder", ["cramped", "guessing", "ending"])
def test_of_an_answer_every_whole_block_is_stored_and_no_other(
    fleet: Deployment, oracle: Oracle, decoder: str
) -> None:
    prompt = make_prompt(PROMPT, f"kept by {decoder}")
    answer = oracle.answer(prompt, max_tokens=ANSWER)
    check_answer(fleet[decoder], prompt, answer)
    # The last token was sampled, and no step has computed it.
    kept = (*prompt, *answer[:-1])
    fleet.store.wait_stored(kept)
    fleet[decoder].node.wait_quiet()

    longer = (*prompt, *oracle.answer(prompt, max_tokens=ANSWER + BLOCK_TOKENS))
    there = [file.exists() for file in fleet.store.files(longer)]
    assert there == [block < len(kept) // BLOCK_TOKENS for block in range(len(there))]
    said = (*prompt, *answer)
    check_loaded(fleet["prefill"], said, oracle.answer(said), hit_tokens=len(kept) // 128 * 128)
    if decoder == "guessing":
        assert wrong_guesses(fleet[decoder].client) > 0


def test_each_of_several_sampled_answers_to_one_prompt_is_stored_under_its_own_name(
    fleet: Deployment, oracle: Oracle
) -> None:
    prompt = make_prompt(PROMPT, "sampled")
    body = {"prompt": list(prompt), "max_tokens": ANSWER, "n": 3, "temperature": 1.0}
    found = _posted(fleet["cramped"].client, "/v1/completions", body)
    answers = {tuple(choice["token_ids"]) for choice in found["choices"]}
    assert len(answers) == 3

    for answer in answers:
        said = (*prompt, *answer)
        fleet.store.wait_stored(said[:-1])
        check_loaded(fleet["prefill"], said, oracle.answer(said))


@pytest.mark.parametrize("decoder", ["cramped", "guessing", "ending"])
def test_an_answer_that_a_stop_token_ends_is_stored_up_to_it(
    fleet: Deployment, oracle: Oracle, decoder: str
) -> None:
    prompt = make_prompt(PROMPT, f"stopped {decoder}")
    whole = oracle.answer(prompt, max_tokens=ANSWER)
    stop = next(token for token in whole[60:] if token not in whole[:60])
    end = whole.index(stop) + 1
    client = fleet[decoder].client
    answer = client.complete(prompt, max_tokens=ANSWER, stop_token_ids=[stop])
    assert (answer.finish_reason, answer.token_ids) == ("stop", whole[:end])

    said = (*prompt, *whole[:end])
    fleet.store.wait_stored(said[:-1])
    hit_tokens = (len(said) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    check_loaded(fleet["prefill"], said, oracle.answer(said), hit_tokens=hit_tokens)


@pytest.mark.parametrize("decoder", ["cramped", "guessing", "ending"])
def test_what_was_answered_before_the_client_hung_up_is_stored(
    fleet: Deployment, oracle: Oracle, decoder: str
) -> None:
    prompt = make_prompt(PROMPT, f"hung up on {decoder}")
    answer = oracle.answer(prompt, max_tokens=ANSWER)
    _hang_up(fleet[decoder].client, prompt, after=200, max_tokens=1500)

    said = (*prompt, *answer[:200])
    fleet.store.wait_stored(said[:-1])
    check_loaded(fleet["prefill"], said, oracle.answer(said))
    assert fleet.store.bad_files() == []


def test_in_a_chat_prefill_computes_what_is_new_since_the_last_turn(
    fleet: Deployment, oracle: Oracle
) -> None:
    messages: list[dict[str, str]] = []
    known = 0
    with proxy(fleet, ONE_TO_ONE, {"p1": "prefill", "d1": "ending"}) as server:
        for turn in range(5):
            question = f"{turn}: What has been computed once need not be computed again. " * 4
            messages.append({"role": "user", "content": question})
            body = {"messages": messages, "max_tokens": 200, "temperature": 0}
            before = fleet["prefill"].client.counters()
            found = _posted(server.client, "/v1/chat/completions", body)
            expected = _posted(oracle.server.client, "/v1/chat/completions", body)
            (choice,), (wanted,) = found["choices"], expected["choices"]
            assert choice["token_ids"] == wanted["token_ids"], f"turn {turn}"
            length = found["usage"]["prompt_tokens"]
            gained = counted(fleet["prefill"].client, before, length)
            # What is answered need not be of the same tokens when it comes back as text.
            assert gained.computed <= length - known + BLOCK_TOKENS, f"turn {turn}: {gained}"
            known = length
            messages.append({"role": "assistant", "content": choice["message"]["content"]})


@pytest.mark.parametrize("handoff", ["chain", "overlap"])
def test_many_users_with_two_decoders_get_plain_vllms_tokens_in_every_turn(
    fleet: Deployment, oracle: Oracle, handoff: str
) -> None:
    decoders = [fleet["cramped"], fleet["guessing"]]
    before = [_troubles(engine) for engine in decoders]

    def talk(client: Client, number: int) -> tuple[Prompt, int]:
        """What was said in the end, and how much of it before the last answer."""
        rng = random.Random(f"{handoff} {number}")
        said = make_prompt(rng.choice((100, 300, 700)), f"user {handoff} {number}")
        asked = len(said)
        for turn in range(TURNS):
            said = (*said, *make_prompt(60, f"user {handoff} {number} {turn}"))
            asked = len(said)
            max_tokens = rng.choice((20, 150, 270))
            expected = oracle.answer(said, max_tokens=max_tokens)
            if rng.random() < 0.3:
                _hang_up(client, said, after=max_tokens // 2, max_tokens=max_tokens)
                said = (*said, *expected[: max_tokens // 2])
                continue
            answer = client.complete(said, max_tokens=max_tokens)
            assert answer.token_ids == expected, f"user {number}, turn {turn}"
            said = (*said, *expected)
        return said, asked

    def crowd(number: int) -> None:
        """Two of these don't fit into the cramped one's memory beside each other."""
        prompt = make_prompt(PROMPT, f"crowd {handoff} {number}")
        expected = oracle.answer(prompt, max_tokens=CRAMPED_TOKENS - 2 * len(prompt))
        check_answer(fleet["cramped"], prompt, expected)

    places = {"p1": "prefill", "d1": "cramped", "d2": "guessing"}
    with (
        proxy(fleet, f"{TWO_DECODERS} --handoff {handoff}", places) as server,
        ThreadPoolExecutor() as pool,
    ):
        crowded = [pool.submit(crowd, number) for number in range(2)]
        talks = at_once(partial(talk, server.client, number) for number in range(NUM_USERS))
        for each in crowded:
            each.result()
    for engine in fleet.engines.values():
        engine.node.wait_quiet()
    assert all(_troubles(e) > b for e, b in zip(decoders, before, strict=True)), "must be harder"
    prefill = fleet["prefill"]
    for said, asked in talks:
        earlier = prefill.client.counters()
        check_answer(prefill, said, oracle.answer(said))
        hits = counted(prefill.client, earlier, len(said)).external_hits
        assert hits >= asked // BLOCK_TOKENS * BLOCK_TOKENS
    assert fleet.store.bad_files() == []


def test_what_was_answered_before_the_engine_was_killed_is_stored(
    fleet: Deployment, oracle: Oracle
) -> None:
    """The last: it is not started again."""
    engine = fleet["guessing"]
    prompt = make_prompt(PROMPT, "killed")
    answer = oracle.answer(prompt, max_tokens=ANSWER)
    with asking(engine.client, prompt, max_tokens=3000) as connection:
        _read_tokens(connection.getresponse(), ANSWER)
        engine.server.kill()

    said = (*prompt, *answer[:200])
    fleet.store.wait_stored(said)
    check_loaded(fleet["prefill"], said, oracle.answer(said))
    longer = (*prompt, *answer)
    check_answer(fleet["prefill"], longer, oracle.answer(longer))
    engine.node.wait_quiet()
    assert fleet.store.bad_files() == []


def _posted(client: Client, path: str, body: dict[str, Any]) -> Any:
    more = {"ignore_eos": True, "return_token_ids": True}
    status, text = client.post(path, {**body, **more})
    assert status == 200, text
    return json.loads(text)


def _hang_up(client: Client, prompt: Prompt, *, after: int, max_tokens: int) -> None:
    with asking(client, prompt, max_tokens=max_tokens) as connection:
        _read_tokens(connection.getresponse(), after)


def _read_tokens(stream: Any, num_tokens: int) -> None:
    """Until at least so many have come. Several may come in one event, which says how many."""
    come = 0
    for line in stream:
        if line.startswith(b"data: {"):
            (choice,) = json.loads(line[len(b"data: ") :])["choices"]
            come += len(choice["token_ids"] or ())
            if come >= num_tokens:
                return
    raise AssertionError(f"{come} of {num_tokens} tokens came")


def _troubles(engine: Engine) -> int:
    """Wrong guesses, and requests that were preempted."""
    return wrong_guesses(engine.client) + metric(engine.client, "vllm:num_preemptions_total")
