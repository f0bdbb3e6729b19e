"""Streams that go on with another decoder, and those that can't."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from tests.pd.conftest import Answer, Fleet
from ucm.pd.legs.resume import Events, Tracker

CHAT, COMPLETIONS = "v1/chat/completions", "v1/completions"


def frames(events: Sequence[dict[str, Any]], *, ident: str) -> list[bytes]:
    return [b"data: " + json.dumps({"id": ident, **event}).encode() + b"\n\n" for event in events]


def tokens(first: int, end: int, *, chat: bool) -> list[dict[str, Any]]:
    """An event for each of the words first..end-1."""
    found = []
    for i in range(first, end):
        said = {"delta": {"content": f"w{i} "}} if chat else {"text": f"w{i} ", "token_ids": [i]}
        found.append({"created": 1, "choices": [{"index": 0, "finish_reason": None, **said}]})
    return found


def streaming(pieces: list[bytes], *, dies: bool) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        if dies:
            assert request.transport is not None
            request.transport.close()
        return response

    return answer


def end(num_prompt: int, num_tokens: int) -> list[dict[str, Any]]:
    usage = {"prompt_tokens": num_prompt, "completion_tokens": num_tokens, "total_tokens": 20}
    return [
        {"created": 2, "choices": [{"index": 0, "finish_reason": "length"}]},
        {"created": 2, "choices": [], "usage": usage},
    ]


def events_of(body: bytes) -> list[dict[str, Any]]:
    found = [line.removeprefix(b"data: ") for line in body.split(b"\n\n") if line]
    assert b"[DONE]" == found.pop()
    return [json.loads(line) for line in found]


@pytest.mark.parametrize("torn", [False, True], ids=["between-events", "inside-an-event"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_stream_that_breaks_off_goes_on_with_another_decoder(
    fleet: Fleet, path: str, torn: bool
):
    chat = path == CHAT
    await fleet.start(1, 2, policy="round-robin")
    head = frames(tokens(0, 5, chat=chat), ident="first")
    if torn:
        head.append(frames(tokens(5, 6, chat=chat), ident="first")[0][:30])
    tail = frames([*tokens(5, 9, chat=chat), *end(15, 4)], ident="second")
    fleet.decode[0].answer = streaming(head, dies=True)
    fleet.decode[1].answer = streaming([*tail, b"data: [DONE]\n\n"], dies=False)
    prompt = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi "}
    fields = {**prompt, "stream": True, "max_tokens": 9, "min_tokens": 6}

    async with await fleet.post(path, **fields) as response:
        events = events_of(await response.read())

    said = [choice for event in events for choice in event["choices"]]
    texts = [(c.get("text") or c.get("delta", {}).get("content") or "").strip() for c in said]
    assert [f"w{i}" for i in range(9)] == [text for text in texts if text]
    assert {"first"} == {event["id"] for event in events}
    assert (10, 9) == (
        events[-1]["usage"]["prompt_tokens"],
        events[-1]["usage"]["completion_tokens"],
    )
    asked = fleet.decode[1].asked[0].fields
    assert (4, 1) == (asked["max_tokens"], asked["min_tokens"])
    if chat:
        said_before = {"role": "assistant", "content": "w0 w1 w2 w3 w4 "}
        assert [*fields["messages"], said_before] == asked["messages"]
        assert (True, False) == (asked["continue_final_message"], asked["add_generation_prompt"])
    else:
        assert "hi w0 w1 w2 w3 w4 " == asked["prompt"]
    assert 1 == await fleet.metric('ucm_pd_requests_total{path="resumed"}')


async def test_a_prompt_of_token_ids_goes_on_with_the_ids_that_came(fleet: Fleet):
    await fleet.start(1, 2, policy="round-robin")
    fleet.decode[0].answer = streaming(frames(tokens(5, 8, chat=False), ident="a"), dies=True)
    fleet.decode[1].answer = streaming([b"data: [DONE]\n\n"], dies=False)

    fields = {"prompt": [1, 2], "stream": True, "return_token_ids": True}
    async with await fleet.post(**fields) as response:
        await response.read()
    assert [1, 2, 5, 6, 7] == fleet.decode[1].asked[0].fields["prompt"]


async def test_a_stream_may_break_off_more_than_once(fleet: Fleet):
    await fleet.start(1, 3, policy="round-robin")
    prompts: list[str] = []

    async def two_more(request: web.Request) -> web.StreamResponse:
        asked = [each.asked for each in fleet.decode]
        prompts[:] = sorted((a.fields["prompt"] for each in asked for a in each), key=len)
        first, is_last = 2 * len(prompts) - 2, len(prompts) == 3
        pieces = frames(tokens(first, first + 2, chat=False), ident=str(first))
        done = [b"data: [DONE]\n\n"] if is_last else []
        return await streaming([*pieces, *done], dies=not is_last)(request)

    for engine in fleet.decode:
        engine.answer = two_more

    async with await fleet.post(prompt="", stream=True, max_tokens=6) as response:
        events = events_of(await response.read())
    assert [[i] for i in range(6)] == [event["choices"][0]["token_ids"] for event in events]
    assert ["", "w0 w1 ", "w0 w1 w2 w3 "] == prompts


UNFIT: dict[str, dict[str, Any]] = {
    "several sequences": {"n": 2},
    "a grammar": {"response_format": {"type": "json_object"}},
    "token ids that nobody says": {"prompt": [1, 2]},
    "several prompts": {"prompt": ["a", "b"]},
}


@pytest.mark.parametrize("fields", UNFIT.values(), ids=UNFIT.keys())
async def test_what_can_not_be_resumed_ends_with_an_error_event(
    fleet: Fleet, fields: dict[str, Any]
):
    await fleet.start(1, 2, policy="round-robin")
    head = frames(tokens(0, 2, chat=False), ident="a")
    fleet.decode[0].answer = streaming(head, dies=True)

    async with await fleet.post(**{"prompt": "hi", "stream": True, **fields}) as response:
        body = await response.read()
    assert body.startswith(b"".join(head))
    assert 502 == json.loads(body.strip().split(b"\n\n")[-1][6:])["error"]["code"]
    assert b"[DONE]" not in body
    assert [] == fleet.decode[1].asked


async def test_with_no_resume_a_stream_ends_where_it_broke_off(fleet: Fleet):
    await fleet.start(1, 2, policy="round-robin", resume=False)
    fleet.decode[0].answer = streaming(frames(tokens(0, 2, chat=False), ident="a"), dies=True)

    async with await fleet.post(prompt="hi", stream=True) as response:
        assert b'"code":502' in await response.read()
    assert [] == fleet.decode[1].asked


async def test_when_nobody_can_go_on_the_client_hears_it(fleet: Fleet):
    await fleet.start(1, 2)
    for engine in fleet.decode:
        engine.answer = streaming(frames(tokens(0, 2, chat=False), ident="a"), dies=True)

    async with await fleet.post(prompt="hi", stream=True) as response:
        body = await response.read()
    assert b'"code":502' in body and b"[DONE]" not in body
    assert [1, 1] == [len(engine.asked) for engine in fleet.decode]


async def test_a_connection_that_breaks_behind_the_last_event_is_a_whole_answer(fleet: Fleet):
    await fleet.start(1, 2, policy="round-robin")
    pieces = [*frames(tokens(0, 2, chat=False), ident="a"), b"data: [DONE]\n\n"]
    fleet.decode[0].answer = streaming(pieces, dies=True)

    async with await fleet.post(prompt="hi", stream=True) as response:
        assert b"".join(pieces) == await response.read()
    assert [] == fleet.decode[1].asked


@given(st.lists(st.sampled_from([b"a", b"\n", b"\r", b"\n\n", b"\r\n\r\n", b"data: \xff"])))
def test_a_stream_cut_into_events_is_the_same_bytes(pieces: list[bytes]):
    events = Events()
    out = [events.feed(piece) for piece in pieces]
    assert all(part.endswith((b"\n\n", b"\r\n\r\n")) for part in out if part)
    assert b"".join(pieces) == b"".join(out) + events.rest()


def test_an_answer_that_goes_on_with_the_clients_own_message_can_not_be_resumed():
    said = {"role": "assistant", "content": "I"}
    fields = {"messages": [said], "continue_final_message": True}
    assert not Tracker(fields, is_chat=True).can_resume


def test_a_tool_call_or_reasoning_can_not_be_resumed():
    for delta in ({"tool_calls": [{"index": 0}]}, {"reasoning": "hm"}, {"reasoning_content": "hm"}):
        tracker = Tracker({"messages": [{"role": "user"}]}, is_chat=True)
        assert tracker.can_resume
        tracker.add(b"".join(frames([{"choices": [{"delta": delta}]}], ident="a")))
        assert not tracker.can_resume


@pytest.mark.parametrize("resume", [True, False])
async def test_a_client_that_goes_when_it_has_read_the_last_event_has_not_left_early(
    fleet: Fleet, resume: bool
):
    await fleet.start(1, 1, resume=resume)
    left = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices": [{"text": "a"}]}\n\n')
        await response.write(b"data: [DONE]\n\n")
        await left.wait()
        return response

    fleet.decode[0].answer = stream
    async with await fleet.post(prompt="hi", stream=True) as response:
        assert (await response.content.readuntil(b"[DONE]\n\n")).endswith(b"data: [DONE]\n\n")
    left.set()
    await fleet.until_metric("ucm_pd_requests_total", 1)
    assert 0 == await fleet.metric("ucm_pd_failed_total")


@pytest.mark.parametrize("num_before", [0, 1, 3], ids=["nothing", "the head", "the head and words"])
async def test_what_is_said_once_in_a_chat_is_said_once_across_the_seam(
    fleet: Fleet, num_before: int
) -> None:
    """The openai client puts the deltas together: a second role would be `assistantassistant`."""
    await fleet.start(1, 2, policy="round-robin")

    def piece(**delta: str) -> dict[str, Any]:
        said = {"index": 0, "delta": delta, "finish_reason": None}
        return {"created": 1, "object": "chat.completion.chunk", "model": "m", "choices": [said]}

    head = {**piece(role="assistant", content=""), "prompt_token_ids": [1, 2]}
    first = frames([head, piece(content="w0 "), piece(content="w1 ")], ident="a")
    second = frames([head, piece(content="w2 ")], ident="b")
    details = {"prompt_tokens_details": {"cached_tokens": 103}}
    tail = end(100 + max(0, num_before - 1), 1)
    tail[1]["usage"] |= details
    fleet.decode[0].answer = streaming([*first[:num_before], b"data: {"], dies=True)
    rest = [*second, *frames(tail, ident="b"), b"data: [DONE]\n\n"]
    fleet.decode[1].answer = streaming(rest, dies=False)

    fields = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    async with await fleet.post(CHAT, **fields) as response:
        events = events_of(await response.read())
    deltas = [c["delta"] for event in events for c in event["choices"] if "delta" in c]
    assert ["assistant"] == [delta["role"] for delta in deltas if "role" in delta]
    assert 1 == sum("prompt_token_ids" in event for event in events)
    usage = events[-1]["usage"]
    assert (100, 100) == (usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])


async def test_offsets_of_a_text_count_from_its_beginning_across_the_seam(fleet: Fleet) -> None:
    await fleet.start(1, 2, policy="round-robin")

    def words(first: int, end: int) -> list[dict[str, Any]]:
        found = tokens(first, end, chat=False)
        for i, event in enumerate(found):
            event["choices"][0]["logprobs"] = {"text_offset": [3 * i]}
        return found

    fleet.decode[0].answer = streaming(frames(words(0, 3), ident="a"), dies=True)
    rest = [*frames(words(3, 6), ident="b"), b"data: [DONE]\n\n"]
    fleet.decode[1].answer = streaming(rest, dies=False)

    async with await fleet.post(prompt="hi", stream=True, logprobs=1) as response:
        events = events_of(await response.read())
    offsets = [event["choices"][0]["logprobs"]["text_offset"] for event in events]
    assert [[0], [3], [6], [9], [12], [15]] == offsets
