"""Conversations of token ids, of whose answers decode has said that they are stored."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as some
from yarl import URL

from examples.cluster.processes import HttpServer, free_port
from tests.pd.conftest import Answer, Engine, Fleet, answering, until
from tests.pd.legs.handoff_parts import a_receipt
from ucm import handoff as h
from ucm.pd.legs.chains import Mark, chain_of, marks_of
from ucm.pd.legs.ends import Ends
from ucm.pd.legs.known import Known

COMPLETIONS, GENERATE = "v1/completions", "inference/v1/generate"
QUESTION, ANSWER = 60, 700
KNOWING: dict[str, Any] = {"known_for_s": 1000.0, "max_new_tokens": QUESTION + 128}
ASKED = h.Wanted(with_answer=True)
all_lengths = some.integers(0, 1200)


def told(tokens: int, answer_ids: list[int] | None = None) -> Answer:
    words = msgspec.structs.replace(a_receipt(is_whole=True), tokens=tokens)
    choices = [{"index": 0, "token_ids": answer_ids}]
    return answering(
        msgspec.json.encode({"choices": choices, "kv_transfer_params": h.params(words)})
    )


def marks(ids: list[int]) -> tuple[Mark, ...]:
    fields = {"prompt": ids}
    return marks_of(fields, chain_of(fields, path="/"))


def remembering(clock: list[float], *, max_new_tokens: int = 100, max_known: int = 1000) -> Known:
    return Known(
        for_s=10.0, max_new_tokens=max_new_tokens, max_known=max_known, clock=lambda: clock[0]
    )


@given(all_lengths, all_lengths, all_lengths, some.integers(0, 3000))
def test_a_prompt_is_known_if_it_begins_with_what_is_stored_and_little_is_behind_that(
    length, answered, more, stored
):
    known = remembering([0.0])
    first, answer = [1] * length, list(range(answered))
    known.answered(marks(first), stored, answer)
    longer = [*first, *answer, *[2] * more]

    # Of less than a part nothing is remembered, and where nothing is stored nothing is known.
    has_any = length >= 256 and stored > 0
    there = min(stored, length + answered)
    assert (has_any and len(longer) - there <= 100) == known.has_nearly_all((), marks(longer))


@given(some.integers(256, 1200), some.integers(1, 1200), some.integers(0, 3000), some.data())
def test_of_a_turn_with_another_answer_only_the_prompt_is_stored(length, answered, stored, data):
    known = remembering([0.0])
    first, answer = [1] * length, list(range(answered))
    known.answered(marks(first), stored, answer)
    other = [*answer]
    end = max(1, min(stored - length, answered))
    other[data.draw(some.integers(0, end - 1))] = 5000
    longer = [*first, *other]

    there = min(stored, length)
    assert (stored > 0 and len(longer) - there <= 100) == known.has_nearly_all((), marks(longer))


def test_of_several_answers_to_one_prompt_each_is_known_and_no_mixture_of_them():
    known = remembering([0.0])
    answers = [[number] * 700 for number in (5, 6)]
    for answer in answers:
        known.answered(marks([1] * 300), 1000, answer)
    answers.append([*answers[0][:300], *answers[1][300:]])

    assert [True, True, False] == [
        known.has_nearly_all((), marks([*[1] * 300, *answer])) for answer in answers
    ]


def test_an_answer_whose_ids_nobody_has_seen_is_new():
    known = remembering([0.0])
    known.answered(marks([1] * 300), 1000)

    assert known.has_nearly_all((), marks([*[1] * 300, *[5] * 100]))
    assert not known.has_nearly_all((), marks([*[1] * 300, *[5] * 101]))


@given(some.integers(257, 1200), some.data())
def test_another_id_anywhere_in_it_makes_it_another_prompt(length, data):
    known = remembering([0.0])
    ids = list(range(length))
    known.answered(marks(ids), 10_000, [1] * 100)
    assert known.has_nearly_all((), marks(ids))
    ids[data.draw(some.integers(0, length - 1))] = 5000

    assert not known.has_nearly_all((), marks(ids))
    assert not known.has_nearly_all((), marks(list(range(length - 1))))


def test_it_is_forgotten_after_a_while_and_the_oldest_first():
    clock = [0.0]
    known = remembering(clock, max_known=3)
    for number in range(9):
        known.answered(marks([number] * 300), 300)
        assert len(known) <= 3
    assert [number >= 6 for number in range(9)] == [
        known.has_nearly_all((), marks([number] * 300)) for number in range(9)
    ]
    clock[0] = 10.1
    assert not known.has_nearly_all((), marks([8] * 300))


def test_texts_and_chats_have_no_marks():
    for fields in ({"prompt": "x" * 9000}, {"messages": [{"role": "user", "content": "x"}]}):
        assert () == marks_of(fields, chain_of(fields, path="/"))
    assert 0 == Ends(9).stored_tokens((), now_s=0.0)


def storing(engine: Engine, *, tokens: int, answer_ids: list[int]) -> Answer:
    """An engine that says that so much is stored, if it is told anything that has it say so."""

    async def answer(request: web.Request) -> web.StreamResponse:
        says = engine.asked[-1].handoff
        has_reason = isinstance(says, (h.Receipt, h.Expected, h.Withdrawn)) or says == ASKED
        return await (told(tokens, answer_ids) if has_reason else answering(b"{}"))(request)

    return answer


async def talk(
    fleet: Fleet,
    path: str,
    name: str,
    more: dict[str, Any],
    *,
    turns: int = 4,
    is_kept: bool = True,
) -> list[str]:
    """Of each turn, the way that it took. A client that has kept no answer goes on with others."""
    said, paths = [1] * 500, []
    for turn in range(turns):
        stored = (len(said) + ANSWER) // 128 * 128
        ids = [turn] * ANSWER
        fleet.decode[0].answer = storing(fleet.decode[0], tokens=stored, answer_ids=ids)
        async with await fleet.post(path, **{name: said}, **more) as response:
            assert 200 == response.status
            assert "ucm" not in await response.text()
            paths.append(response.headers["x-ucm-pd-path"])
        said = [*said, *(ids if is_kept else [9] * ANSWER), *[turn] * QUESTION]
    return paths


@pytest.mark.parametrize("mode", ["chain", "overlap"])
@pytest.mark.parametrize(
    ("path", "name", "more"),
    [(COMPLETIONS, "prompt", {}), (GENERATE, "token_ids", {"sampling_params": {}})],
)
async def test_a_conversation_of_ids_goes_on_at_decode_alone_once_its_answers_are_kept(
    fleet: Fleet, path: str, name: str, more: dict[str, Any], mode: str
):
    await fleet.start(1, 1, handoff=mode, **KNOWING)
    fleet.prefill[0].answer = told(129)

    assert ["pd", *["skip-known"] * 5] == await talk(fleet, path, name, more, turns=6)
    assert 5 == await fleet.metric('ucm_pd_not_prefilled_total{reason="known"}')
    assert [ASKED] * 5 == [each.handoff for each in fleet.decode[0].asked[1:]]


async def test_a_client_that_goes_on_with_other_answers_is_prefilled_each_time(fleet: Fleet):
    await fleet.start(1, 1, **KNOWING)
    fleet.prefill[0].answer = told(129)

    assert ["pd"] * 4 == await talk(fleet, COMPLETIONS, "prompt", {}, is_kept=False)


@pytest.mark.parametrize("mode", ["chain", "overlap"])
async def test_a_turn_whose_prefill_fails_is_asked_for_what_decode_keeps_of_it(
    fleet: Fleet, mode: str
):
    await fleet.start(1, 1, handoff=mode, **KNOWING)
    fleet.prefill[0].answer = answering(b"", status=400)

    assert ["skip-known"] * 3 == (await talk(fleet, COMPLETIONS, "prompt", {}))[1:]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": [1] * 500, "stream": True},
        {"prompt": [1] * 500, "kv_transfer_params": {"of": "another"}},
        {"prompt": [1] * 500, "sampling_params": {"extra_args": {"kv_transfer_params": {"b": 1}}}},
        {"prompt": [1] * 200},
        {"prompt": "x" * 5000},
        {"messages": [{"role": "user", "content": "x"}]},
    ],
    ids=["streamed", "another's words", "another's in extra_args", "few ids", "text", "chat"],
)
async def test_where_a_receipt_is_of_no_use_or_would_be_in_the_way_none_is_asked_for(
    fleet: Fleet, fields: dict[str, Any]
):
    await fleet.start(1, 1, **KNOWING)
    fleet.prefill[0].answer = told(129)
    path = "v1/chat/completions" if "messages" in fields else COMPLETIONS
    paths = []
    for _ in range(2):
        async with await fleet.post(path, **fields) as response:
            paths.append(response.headers["x-ucm-pd-path"])

    assert ["pd", "skip-known"] == paths
    assert fields == fleet.decode[0].asked[1].fields


async def test_without_a_time_to_know_prompts_for_decode_is_asked_for_nothing(fleet: Fleet):
    await fleet.start(1, 1)
    fleet.prefill[0].answer = answering(b"", status=400)
    await talk(fleet, COMPLETIONS, "prompt", {}, turns=2)

    assert [None, None] == [each.handoff for each in fleet.decode[0].asked]


@pytest.mark.process
async def test_the_proxys_log_says_why_each_turn_had_no_prefill_and_how_much_of_it_is_stored(
    fleet: Fleet, tmp_path: Path
):
    await fleet.start(1, 1)
    fleet.prefill[0].answer = told(129)
    port = free_port()
    ports = ["--prefiller-port", str(fleet.prefill[0].url.port), "--port", str(port)]
    ports += ["--decoder-port", str(fleet.decode[0].url.port)]
    flags = ["--known-for-s", "1000", "--max-new-tokens", str(QUESTION + 128)]
    command = [sys.executable, "-m", "ucm.pd.toy_proxy_server", *ports, *flags]
    with HttpServer(command, port=port, log=tmp_path / "log", health_path="/healthcheck") as proxy:
        await asyncio.to_thread(proxy.wait_ready, 30.0)
        fleet.proxy = URL(f"http://localhost:{port}")
        await talk(fleet, COMPLETIONS, "prompt", {}, turns=4)

        def lines() -> list[dict[str, Any]]:
            found = [each[each.find("{") :] for each in proxy.log_text().splitlines()]
            return [json.loads(each) for each in found if '"route":"POST' in each]

        async def are_logged() -> bool:
            return len(lines()) == 4

        await until(are_logged)
    ways = [(each["path"], each.get("reason"), each["stored_tokens"]) for each in lines()]
    stored = [(500 + ANSWER + turn * (ANSWER + QUESTION)) // 128 * 128 for turn in range(4)]
    assert [("pd", None), *[("skip-known", "known")] * 3] == [way[:2] for way in ways]
    assert stored == [way[2] for way in ways]


async def test_without_kept_answers_every_turn_of_ids_is_prefilled(fleet: Fleet):
    await fleet.start(1, 1, **KNOWING)
    fleet.prefill[0].answer = told(129)
    said = [1] * 500
    for turn in range(3):
        fleet.decode[0].answer = told(len(said) // 128 * 128)
        async with await fleet.post(COMPLETIONS, prompt=said) as response:
            assert "pd" == response.headers["x-ucm-pd-path"]
        said = [*said, *[turn] * (ANSWER + QUESTION)]
