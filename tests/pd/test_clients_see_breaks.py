"""Whatever breaks, the clients that people use see an error, never a short answer as if whole."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from tests.pd.conftest import Fleet
from tests.pd.leftovers import LEFT_TO_THE_COLLECTOR
from tests.pd.protocol_answers import STREAMS, WHOLE
from tests.pd.protocol_clients import CLIENTS, ERRORS, QUESTION, Call

# The clients leave connections to the garbage collector, litellm those of all its requests.
pytestmark = [*LEFT_TO_THE_COLLECTOR]


@pytest_asyncio.fixture(autouse=True)
async def _collected() -> AsyncIterator[None]:
    """Here, where their warnings are expected. What was there before is not looked at again."""
    gc.freeze()
    yield
    await asyncio.sleep(0)
    gc.collect()
    gc.unfreeze()


@dataclass(frozen=True)
class Break:
    """`num_whole` events of the stream come, and then `part` bytes of the next one (of the body, if
    the answer is no stream). `ends` properly, or the connection is cut."""

    stream: bool
    num_whole: int = 0
    part: int = 0
    ends: bool = False
    has_head: bool = True
    has_length: bool = False


BREAKS = {
    "before the head": Break(True, has_head=False),
    "before the first byte": Break(True),
    "between events": Break(True, num_whole=2),
    "inside an event": Break(True, num_whole=1, part=25),
    "an end without the last event": Break(True, num_whole=2, ends=True),
    "whole: before the head": Break(False, has_head=False),
    "whole: inside its body": Break(False, part=40),
    "whole: inside a body with a length": Break(False, part=40, has_length=True),
}


def breaking(path: str, broken: Break) -> Any:
    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        if not broken.has_head:
            request.transport.close()
            return web.Response()
        body = json.dumps(WHOLE[path]).encode()
        kind = "text/event-stream" if broken.stream else "application/json"
        headers = {"Content-Type": kind}
        if broken.has_length:
            headers["Content-Length"] = str(len(body))
        found = web.StreamResponse(headers=headers)
        await found.prepare(request)
        async for piece in pieces(path, broken, body):
            await found.write(piece)
        if not broken.ends:
            request.transport.close()
        return found

    return answer


async def pieces(path: str, broken: Break, body: bytes) -> AsyncIterator[bytes]:
    events = STREAMS[path] if broken.stream else [body]
    for event in events[: broken.num_whole]:
        yield event
    if broken.part:
        yield events[broken.num_whole][: broken.part]


def whole(path: str) -> Any:
    async def answer(request: web.Request) -> web.StreamResponse:
        if not (await request.json()).get("stream"):
            return web.json_response(WHOLE[path])
        found = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await found.prepare(request)
        for event in STREAMS[path]:
            await found.write(event)
        return found

    return answer


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(("path", "call"), CLIENTS.values(), ids=CLIENTS.keys())
async def test_every_client_has_the_text_of_a_whole_answer(
    fleet: Fleet, path: str, call: Call, stream: bool
) -> None:
    await fleet.start(1, 1)
    fleet.decode[0].answer = whole(path)

    assert "one two" == await call(str(fleet.proxy), stream)


@pytest.mark.parametrize("broken", BREAKS.values(), ids=BREAKS.keys())
@pytest.mark.parametrize(("path", "call"), CLIENTS.values(), ids=CLIENTS.keys())
async def test_every_client_sees_an_error_however_an_answer_breaks(
    fleet: Fleet, path: str, call: Call, broken: Break
) -> None:
    await fleet.start(1, 1, resume=False)
    fleet.decode[0].answer = breaking(path, broken)

    with pytest.raises(ERRORS):
        await call(str(fleet.proxy), broken.stream)


async def test_the_proxys_own_errors_about_messages_have_anthropics_form(fleet: Fleet) -> None:
    await fleet.start(1, 0)

    async with await fleet.post("v1/messages", messages=QUESTION, max_tokens=1) as answer:
        body = await answer.json()
    assert 503 == answer.status
    assert ("error", "overloaded_error") == (body["type"], body["error"]["type"])
    async with fleet.client.post(fleet.proxy / "v1/messages", data=b"[") as answer:
        body = await answer.json()
    assert (400, "invalid_request_error") == (answer.status, body["error"]["type"])


async def test_a_broken_stream_of_token_ids_ends_with_an_error_event(fleet: Fleet) -> None:
    """As vLLM's own errors in it."""
    await fleet.start(1, 1)
    fleet.decode[0].answer = breaking("/v1/completions", Break(True, num_whole=1))

    async with await fleet.post("inference/v1/generate", stream=True) as answer:
        last = (await answer.read()).strip().splitlines()[-1]
    assert 502 == json.loads(last.removeprefix(b"data: "))["error"]["code"]


@pytest.mark.parametrize("path", ["v1/other", "cohere/v2/chat"])
async def test_where_events_are_not_known_the_connection_ends_inside_the_body(
    fleet: Fleet, path: str
) -> None:
    await fleet.start(1, 1)
    fleet.decode[0].answer = breaking("/v1/completions", Break(True, num_whole=1))

    async with await fleet.post(path, stream=True) as answer:
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()


async def test_a_compressed_stream_of_events_is_not_held_back(fleet: Fleet) -> None:
    """It can't be resumed either: nobody has read it."""
    await fleet.start(1, 1)
    packed = b"\x1f\x8b no line ends here"

    async def stream(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "text/event-stream", "Content-Encoding": "gzip"}
        found = web.StreamResponse(headers=headers)
        await found.prepare(request)
        await found.write(packed)
        await fleet.decode[0].never(request)
        return found

    fleet.decode[0].answer = stream
    async with await fleet.post(prompt="hi", stream=True) as answer:
        assert packed == await answer.content.readexactly(len(packed))


@pytest.mark.parametrize("path", ["v1/messages", "inference/v1/generate"])
async def test_messages_and_generate_take_both_legs(fleet: Fleet, path: str) -> None:
    await fleet.start(1, 1)

    asked = {"messages": QUESTION, "max_tokens": 7, "kv_transfer_params": {"ucm": {"kind": "a"}}}
    async with await fleet.post(path, **asked) as answer:
        assert "pd" == answer.headers["x-ucm-pd-path"]
        assert "x-ucm-pd-reason" not in answer.headers
    (first,), (second,) = fleet.prefill[0].asked, fleet.decode[0].asked
    assert "wanted" == first.fields["kv_transfer_params"]["ucm"]["kind"]
    assert (7, None) == (second.fields["max_tokens"], second.fields["kv_transfer_params"])


async def test_what_goes_to_decode_alone_says_why(fleet: Fleet) -> None:
    await fleet.start(1, 1)

    for path, fields, why in (
        ("v1/embeddings", {}, "route"),
        ("v1/responses", {"input": "x", "previous_response_id": "r"}, "continued"),
    ):
        async with await fleet.post(path, **fields) as answer:
            assert why == answer.headers["x-ucm-pd-reason"]
        assert 1 == await fleet.metric(f'ucm_pd_not_prefilled_total{{reason="{why}"}}')
    assert [] == fleet.prefill[0].asked
