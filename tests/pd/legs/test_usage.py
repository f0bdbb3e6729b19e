"""Clients are told what was cached when their request came, not what prefill has put there."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import openai
import pytest
from aiohttp import web

from tests.pd.conftest import Fleet, answering
from tests.pd.legs.handoff_parts import PATIENCE_S, after, hang_up, streaming
from tests.pd.legs.kept_parts import Kept
from tests.pd.legs.test_kept import get
from tests.pd.legs.usage_parts import PATHS, PROMPT_TOKENS, decoding, events, whole
from tests.pd.protocol_answers import completion, sse
from ucm.handoff import Expected
from ucm.pd.legs.usage import FoundCached, corrected, found_in

QUESTION: Any = [{"role": "user", "content": "hi"}]
HANDOFFS = ["chain", "overlap"]


async def ask(fleet: Fleet, path: str, *, stream: bool) -> bytes:
    body = {"prompt": "hi", "messages": QUESTION, "input": "hi", "max_tokens": 2}
    async with await fleet.post(path[1:], stream=stream, **body) as answer:
        read = await answer.read()
        assert answer.status == 200, read
        if not stream:
            assert int(answer.headers["Content-Length"]) == len(read)
        return read


async def prefilled(fleet: Fleet, path: str, found: int | None, **settings: Any) -> None:
    await fleet.start(1, 1, **settings)
    first = whole(path, found, created=20, receipt=True)
    fleet.prefill[0].answer = answering(first)
    fleet.decode[0].answer = after(fleet.prefill[0].started, decoding(path, 99))


@pytest.mark.parametrize("handoff", HANDOFFS)
@pytest.mark.parametrize("found", [0, 64])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("path", PATHS)
async def test_clients_are_told_what_prefill_has_found_and_all_else_is_decodes(
    fleet: Fleet, path: str, stream: bool, found: int, handoff: str
) -> None:
    await prefilled(fleet, path, found, handoff=handoff, usage_wait_s=PATIENCE_S)
    got = await ask(fleet, path, stream=stream)

    if stream:
        expected = b"".join(events(path, found, created=20))
    else:
        expected = whole(path, found, created=20)
    assert tight(expected) == tight(got)


def tight(text: bytes) -> bytes:
    """What is replaced is written without blanks."""
    return text.replace(b": ", b":").replace(b", ", b",")


@pytest.mark.parametrize("handoff", HANDOFFS)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("path", PATHS)
async def test_where_nothing_has_to_be_replaced_not_a_byte_is(
    fleet: Fleet, path: str, stream: bool, handoff: str
) -> None:
    await fleet.start(1, 1, handoff=handoff)
    fleet.prefill[0].answer = answering(whole(path, 64, receipt=True))
    fleet.decode[0].answer = decoding(path, 64)

    got = await ask(fleet, path, stream=stream)
    assert (b"".join(events(path, 64)) if stream else whole(path, 64)) == got


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_prefill_that_says_nothing_of_it_changes_nothing_and_the_log_says_why_once(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    path = "/v1/completions"
    await prefilled(fleet, path, None)
    for _ in range(3):
        got = await ask(fleet, path, stream=stream)
        assert (b"".join(events(path, 99)) if stream else whole(path, 99)) == got
    assert 1 == caplog.text.count("--enable-prompt-tokens-details")


async def test_after_a_prefill_that_failed_decode_says_what_it_found_itself(fleet: Fleet) -> None:
    await prefilled(fleet, "/v1/completions", 0)
    fleet.prefill[0].answer = answering(whole("/v1/completions", 0), status=500)
    assert whole("/v1/completions", 99) == await ask(fleet, "/v1/completions", stream=False)


async def test_words_of_a_client_are_no_usage(fleet: Fleet) -> None:
    """Though they look like it."""
    await prefilled(fleet, "/v1/completions", 0)
    text = '"usage": {"prompt_tokens_details": {"cached_tokens": 99}}'
    body = json.dumps(completion(text, "stop")).encode()
    fleet.decode[0].answer = answering(body)
    assert body == await ask(fleet, "/v1/completions", stream=False)
    pieces = [sse(completion(text, "stop")), sse("[DONE]")]
    fleet.decode[0].answer = streaming(*pieces)
    assert b"".join(pieces) == await ask(fleet, "/v1/completions", stream=True)


async def test_the_clients_that_people_use_read_it(fleet: Fleet) -> None:
    paths = {"/v1/chat/completions": 0, "/v1/responses": 16, "/v1/messages": 32}
    await fleet.start(1, 1)

    async def prefill(request: web.Request) -> web.StreamResponse:
        body = whole(request.path, paths[request.path], created=0, receipt=True)
        return web.Response(body=body, content_type="application/json")

    async def decode(request: web.Request) -> web.StreamResponse:
        return await decoding(request.path, 99, created=0)(request)

    fleet.prefill[0].answer, fleet.decode[0].answer = prefill, decode
    async with openai.AsyncOpenAI(base_url=f"{fleet.proxy}v1", api_key="k") as client:
        chat = await client.chat.completions.create(model="m", messages=QUESTION)
        assert chat.usage and chat.usage.prompt_tokens_details
        assert 0 == chat.usage.prompt_tokens_details.cached_tokens
        response = await client.responses.create(model="m", input="hi")
        assert response.usage and 16 == response.usage.input_tokens_details.cached_tokens
    url = str(fleet.proxy).rstrip("/")
    async with anthropic.AsyncAnthropic(base_url=url, api_key="k") as claude:
        asked: Any = {"model": "m", "messages": QUESTION, "max_tokens": 9}
        async with claude.messages.stream(**asked) as said:
            message = await said.get_final_message()
    usage = message.usage
    assert (32, PROMPT_TOKENS - 32) == (usage.cache_read_input_tokens, usage.input_tokens)


async def test_a_stream_that_began_before_prefill_had_answered_ends_with_what_it_found(
    fleet: Fleet,
) -> None:
    path = "/v1/completions"
    await fleet.start(1, 1, handoff="overlap", usage_wait_s=PATIENCE_S)
    begun = asyncio.Event()

    async def first_byte_is_out() -> None:
        begun.set()

    fleet.prefill[0].answer = after(begun, answering(whole(path, 0, created=20, receipt=True)))
    fleet.decode[0].answer = streaming(*events(path, 99), then=first_byte_is_out)
    got = await ask(fleet, path, stream=True)
    assert Expected() == fleet.decode[0].asked[0].handoff
    assert tight(b"".join(events(path, 0, created=20))) == tight(got)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_nobody_waits_long_for_a_prefill_that_decode_did_not_need(
    fleet: Fleet, stream: bool
) -> None:
    path = "/v1/completions"
    await fleet.start(1, 1, handoff="overlap", usage_wait_s=0.05)
    fleet.prefill[0].answer = fleet.prefill[0].never
    fleet.decode[0].answer = after(fleet.prefill[0].started, decoding(path, 99))
    got = await asyncio.wait_for(ask(fleet, path, stream=stream), PATIENCE_S)
    assert (b"".join(events(path, 99)) if stream else whole(path, 99)) == got
    await asyncio.wait_for(fleet.prefill[0].cancelled.wait(), PATIENCE_S)


async def test_a_stream_that_another_decoder_ends_says_what_prefill_had_found(fleet: Fleet) -> None:
    path = "/v1/completions"
    await fleet.start(1, 2, policy="round-robin")
    fleet.prefill[0].answer = answering(whole(path, 16, created=0, receipt=True))
    begun, last = events(path, 99)[:1], events(path, 101)

    async def breaks_off(request: web.Request) -> web.StreamResponse:
        await streaming(*begun)(request)
        return await hang_up(request)

    fleet.decode[0].answer = breaks_off
    fleet.decode[1].answer = streaming(*last[1:])
    got = await ask(fleet, path, stream=True)
    told = [json.loads(line[6:]) for line in got.splitlines() if line.startswith(b"data: {")]
    usage = told[-1]["usage"]
    assert 2 == len(fleet.decode[0].asked) + len(fleet.decode[1].asked)
    assert 16 == usage["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("fields", [{"stream": True}, {"background": True}, {}], ids=str)
@pytest.mark.parametrize("handoff", HANDOFFS)
async def test_a_response_says_the_same_of_it_whenever_it_is_asked_for(
    fleet: Fleet, handoff: str, fields: dict[str, bool]
) -> None:
    path = "/v1/responses"
    await prefilled(fleet, path, 16, handoff=handoff, usage_wait_s=PATIENCE_S)
    kept = Kept(fleet.decode[0])
    fleet.decode[0].answer = kept.answer
    (await fleet.post(path[1:], input="hi", **fields)).close()
    (response_id,) = kept.responses
    # It has ended meanwhile.
    kept.responses[response_id]["usage"] = json.loads(whole(path, 99))["usage"]

    status, body = await get(fleet, f"v1/responses/{response_id}")
    details = json.loads(body)["usage"]["input_tokens_details"]
    assert (200, 16, 20) == (status, details["cached_tokens"], details["cache_write_tokens"])
    _, streamed = await get(fleet, f"v1/responses/{response_id}?stream=true")
    assert b'"cached_tokens":16' in streamed
    # What goes on with it has found all of that itself.
    kept.answer_usage = 99
    async with await fleet.post(path[1:], input="a", previous_response_id=response_id) as answer:
        details = (await answer.json())["usage"]["input_tokens_details"]
    assert 99 == details["cached_tokens"]


@pytest.mark.parametrize("fields", [{"stream": True}, {"background": True}], ids=str)
async def test_a_response_that_is_only_announced_does_not_end_its_prefill(
    fleet: Fleet, fields: dict[str, bool]
) -> None:
    """Decode says at once that there will be one, and has not begun."""
    await fleet.start(1, 1, handoff="overlap", usage_wait_s=0.01)
    release = asyncio.Event()
    fleet.prefill[0].answer = after(release, answering(whole("/v1/responses", 0, receipt=True)))
    fleet.decode[0].answer = Kept(fleet.decode[0]).answer
    asked = asyncio.create_task(fleet.post("v1/responses", input="hi", **fields))
    await asyncio.wait_for(fleet.prefill[0].started.wait(), PATIENCE_S)
    await asyncio.sleep(0.1)
    assert not fleet.prefill[0].cancelled.is_set()
    release.set()
    (await asyncio.wait_for(asked, PATIENCE_S)).close()
    assert not fleet.prefill[0].cancelled.is_set()
    assert Expected() != fleet.decode[0].asked[0].handoff


# -- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_prefills_answer_says_what_it_has_found(path: str) -> None:
    assert FoundCached(16, 1) == found_in(whole(path, 16))
    if path != "/v1/responses":
        assert found_in(whole(path, None)) is None


@pytest.mark.parametrize("answer", [b"", b"{", b"[]", b'{"usage": 1}', b'{"usage": {}}', b"\xff"])
def test_of_an_answer_that_can_not_be_read_nothing_is_known(answer: bytes) -> None:
    assert found_in(answer) is None


def test_no_more_is_cached_than_the_prompt_has() -> None:
    usage = {"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 9}}
    assert 10 == corrected(usage, FoundCached(12, None))["prompt_tokens_details"]["cached_tokens"]
    usage = {"input_tokens": 1, "cache_read_input_tokens": 9}
    assert {"input_tokens": 0, "cache_read_input_tokens": 10} == corrected(
        usage, FoundCached(12, 5)
    )


def test_what_later_turns_of_one_response_find_cached_stays() -> None:
    details = {"cached_tokens": 90 + 120, "cached_tokens_per_turn": [90, 120]}
    usage = {"input_tokens": 230, "input_tokens_details": details}
    got = corrected(usage, FoundCached(16, None))["input_tokens_details"]
    assert {"cached_tokens": 16 + 120, "cached_tokens_per_turn": [16, 120]} == got
