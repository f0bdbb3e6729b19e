"""The two legs of a request, against engines that record."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from io import BytesIO

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from tests.pd.conftest import Bench, Fleet, answering, until

PATIENCE_S = 10.0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_prefill_gets_one_token_to_make_and_decode_the_clients_own_bytes(bench: Bench, path):
    body = b'{ "prompt": "caf\\u00e9 \xc3\xa9",  "max_tokens":20, "temperature":0 }'

    async with bench.client.post(bench.proxy.with_path(path), data=body) as response:
        assert {"from": "decode"} == await response.json(content_type=None)

    (first,), (second,) = bench.prefill.asked, bench.decode.asked
    assert (path, 1, False) == (first.path, first.fields["max_tokens"], first.fields["stream"])
    assert (path, body) == (second.path, second.body)


async def test_decode_is_asked_after_prefill_has_answered(bench: Bench):
    release = asyncio.Event()

    async def slow(_):
        await release.wait()
        return web.json_response({})

    bench.prefill.answer = slow
    request = asyncio.create_task(bench.post(prompt="hi"))
    await bench.prefill.started.wait()
    await asyncio.sleep(0.05)
    assert [] == bench.decode.asked

    release.set()
    (await request).close()
    assert 1 == len(bench.decode.asked)


async def test_headers_of_the_client_reach_both_and_those_of_one_connection_neither(bench: Bench):
    headers = {
        "Authorization": "Bearer key",
        "X-Request-Id": "7",
        "Connection": "keep-alive, X-Hop",
    }
    headers["X-Hop"] = "mine"

    async with bench.client.post(bench.proxy / "v1/completions", json={}, headers=headers) as got:
        assert (200, "7") == (got.status, got.headers["X-Request-Id"])

    for engine, request_id in ((bench.prefill, "7-p"), (bench.decode, "7")):
        seen = engine.asked[0].headers
        assert ("Bearer key", request_id) == (seen["Authorization"], seen["X-Request-Id"])
        assert "X-Hop" not in seen
        assert f"{engine.url.host}:{engine.url.port}" == seen["Host"]


async def test_a_stream_arrives_byte_by_byte_as_decode_sent_it_while_it_is_sent(bench: Bench):
    """Whatever the frames hold, and however they are split or glued together."""
    pieces = [b'data: {"a": 1}\n\nda', b"ta: {}\n\nda", b"ta: \xff\xfe\n\n", b"data: [DONE]\n\n"]
    go_on = asyncio.Event()

    async def stream(request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(pieces[0])
        await go_on.wait()
        for piece in pieces[1:]:
            await response.write(piece)
        return response

    bench.decode.answer = stream
    async with await bench.post(prompt="hi", stream=True) as response:
        assert "text/event-stream" == response.headers["Content-Type"]
        assert "chunked" == response.headers["Transfer-Encoding"]
        first = await response.content.readany()
        assert b'data: {"a": 1}\n\n' == first
        go_on.set()
        assert b"".join(pieces) == first + await response.content.read()


@pytest.mark.parametrize("stream", [True, False])
async def test_an_error_of_decode_keeps_its_status_and_body(bench: Bench, stream):
    bench.decode.answer = answering(b'{"error": {"message": "too long"}}', status=400)

    async with await bench.post(prompt="hi", stream=stream) as response:
        assert 400 == response.status
        assert b'{"error": {"message": "too long"}}' == await response.read()


async def test_a_body_that_is_compressed_stays_compressed(bench: Bench):
    async def zipped(_):
        return web.Response(body=b"\x1f\x8b not really", headers={"Content-Encoding": "gzip"})

    bench.decode.answer = zipped
    async with await bench.post(prompt="hi") as response:
        assert "gzip" == response.headers["Content-Encoding"]
        assert b"\x1f\x8b not really" == await response.read()


@pytest.mark.parametrize("status", [400, 500, 503])
async def test_an_error_of_prefill_is_logged_and_decode_answers(bench: Bench, caplog, status):
    bench.prefill.answer = answering(b"no such luck", status=status)

    async with await bench.post(prompt="hi") as response:
        assert (200, {"from": "decode"}) == (response.status, await response.json())
    assert "no such luck" in caplog.text


async def test_without_a_prefill_instance_decode_answers(bench: Bench, caplog):
    await bench.servers["prefill"].close()

    async with await bench.post(prompt="hi") as response:
        assert (200, {"from": "decode"}) == (response.status, await response.json())
        assert "decode-only" == response.headers["x-ucm-pd-path"]
    assert "refused" in caplog.text


async def test_a_prefill_that_dies_in_its_answer_does_not_matter(bench: Bench):
    async def die(request):
        request.transport.close()
        return web.Response()

    bench.prefill.answer = die
    async with await bench.post(prompt="hi") as response:
        assert 200 == response.status


async def test_without_a_decode_instance_the_client_gets_502_and_the_reason(bench: Bench):
    await bench.servers["decode"].close()

    async with await bench.post(prompt="hi") as response:
        error = (await response.json())["error"]
    assert 502 == response.status == error["code"]
    assert str(bench.decode.url.origin()) in error["message"]


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b'"text"', b"\xff"])
async def test_what_is_no_json_object_is_a_400_in_openais_words(bench: Bench, body: bytes):
    async with bench.client.post(bench.proxy / "v1/completions", data=body) as response:
        error = (await response.json())["error"]
    assert 400 == response.status == error["code"]
    assert "JSON" in error["message"]
    assert [] == bench.prefill.asked == bench.decode.asked


@dataclass
class Halting:
    """An answer that halts behind these pieces, or without even a head, and never goes on."""

    pieces: tuple[bytes, ...] | None
    streams: bool = True
    dies: bool = False
    halted: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        whole, streamed = {"Content-Length": "1000"}, {"Content-Type": "text/event-stream"}
        response = web.StreamResponse(headers=streamed if self.streams else whole)
        if self.pieces is not None:
            await response.prepare(request)
            for piece in self.pieces:
                await response.write(piece)
        self.halted.set()
        if not self.dies:
            await asyncio.Event().wait()
        assert request.transport is not None
        request.transport.close()
        return response


async def until_nothing_runs(fleet: Fleet) -> None:
    """Neither at an instance nor in the proxy."""

    async def nothing_runs() -> bool:
        async with fleet.client.get(fleet.proxy / "instances") as response:
            running = [each["running"] for each in (await response.json())["instances"]]
        open_or_queued = await fleet.metric("ucm_pd_open") + await fleet.metric("ucm_pd_queued")
        return not any(running) and not open_or_queued

    await until(nothing_runs)


def count_asked(fleet: Fleet) -> tuple[int, int]:
    """Prefillers, decoders."""
    prefill, decode = (
        sum(len(engine.asked) for engine in engines) for engines in (fleet.prefill, fleet.decode)
    )
    return prefill, decode


def event(word: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": word}]}).encode() + b"\n\n"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("role", "pieces", "asked"),
    [
        ("prefill", None, (1, 0)),
        ("prefill", (), (1, 0)),
        ("decode", None, (1, 1)),
        ("decode", (), (1, 1)),
        ("decode", (event("a"), event("b")), (1, 1)),
    ],
    ids=["in-prefill", "after-prefills-head", "before-the-head", "after-the-head", "in-the-body"],
)
async def test_a_client_that_leaves_cancels_what_runs_for_it_and_nothing_is_asked_after_it(
    fleet: Fleet,
    role: str,
    pieces: tuple[bytes, ...] | None,
    asked: tuple[int, int],
    stream: bool,
):
    await fleet.start(2, 2, policy="round-robin")
    engine = (fleet.prefill if role == "prefill" else fleet.decode)[0]
    engine.answer = halting = Halting(pieces, streams=stream)
    received, expected = b"", b"".join(pieces or ()) if stream else b""

    async def client() -> None:
        nonlocal received
        async with await fleet.post(prompt="hi", stream=stream) as response:
            async for piece in response.content.iter_any():
                received += piece

    async def has_received() -> bool:
        return received == expected

    leaving = asyncio.create_task(client())
    await asyncio.wait_for(halting.halted.wait(), PATIENCE_S)
    await until(has_received)
    leaving.cancel()

    await asyncio.wait_for(engine.cancelled.wait(), PATIENCE_S)
    await until_nothing_runs(fleet)
    assert asked == count_asked(fleet)


async def test_a_client_that_leaves_a_resumed_stream_cancels_who_goes_on_with_it(fleet: Fleet):
    await fleet.start(1, 3, policy="round-robin")
    fleet.decode[0].answer = Halting((event("a"),), dies=True)
    for engine in fleet.decode[1:]:
        engine.answer = Halting((event("b"),))

    response = await fleet.post(prompt="hi", stream=True)
    received = b""
    while b'"b"' not in received:
        received += await asyncio.wait_for(response.content.readany(), PATIENCE_S)
    response.close()

    (second,) = [engine for engine in fleet.decode[1:] if engine.asked]
    await asyncio.wait_for(second.cancelled.wait(), PATIENCE_S)
    await until_nothing_runs(fleet)
    assert (1, 2) == count_asked(fleet)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_for_a_client_that_leaves_a_queue_nothing_is_asked_when_its_turn_comes(
    fleet: Fleet, role: str
):
    await fleet.start(1, 1, max_running=1)
    engine = (fleet.prefill if role == "prefill" else fleet.decode)[0]
    engine.answer = engine.never
    queued = f'ucm_pd_queued{{role="{role}"}}'

    async def is_left() -> bool:
        return 0 == await fleet.metric(queued)

    running = asyncio.create_task(fleet.ask(prompt="a"))
    await asyncio.wait_for(engine.started.wait(), PATIENCE_S)
    leaving = asyncio.create_task(fleet.ask(prompt="b"))
    await fleet.until_metric(queued, 1)
    before = count_asked(fleet)
    leaving.cancel()
    await until(is_left)
    running.cancel()

    await until_nothing_runs(fleet)
    assert before == count_asked(fleet)


async def test_a_decode_that_dies_in_a_stream_does_not_look_like_a_whole_answer(bench: Bench):
    async def die(request):
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: {}\n\n")
        request.transport.close()
        return response

    bench.decode.answer = die
    async with await bench.post(prompt="hi", stream=True) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()


async def test_everything_that_does_not_generate_is_decodes(bench: Bench):
    bench.decode.answer = answering(b"whatever decode says", status=203)

    for method, path in (("GET", "v1/models"), ("POST", "tokenize"), ("DELETE", "v1/x?a=%2F")):
        url = URL(f"{bench.proxy}{path}", encoded=True)
        async with bench.client.request(method, url, data=b"as it is") as response:
            assert (203, b"whatever decode says") == (response.status, await response.read())
    asked = [(asked.method, asked.path) for asked in bench.decode.asked]
    assert [("GET", "/v1/models"), ("POST", "/tokenize"), ("DELETE", "/v1/x?a=%2F")] == asked
    assert b"as it is" == bench.decode.asked[1].body
    assert [] == bench.prefill.asked


async def test_healthcheck_answers_while_the_engines_are_away(bench: Bench):
    await bench.servers["decode"].close()

    async with bench.client.get(bench.proxy / "healthcheck") as response:
        assert "ok" == (await response.json())["status"]


async def test_large_bodies_and_many_requests_at_once_all_arrive(bench: Bench):
    """Neither aiohttp's limit of 1 MiB per body nor its 100 connections at once is in the way."""
    everyone, release = asyncio.Event(), asyncio.Event()

    async def hold(_):
        if len(bench.decode.asked) == 150:
            everyone.set()
        await release.wait()
        return web.Response(body=b"x" * (1 << 20))

    bench.decode.answer = hold
    prompt = "x" * (2 << 20)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
        url = bench.proxy / "v1/completions"
        bodies = [json.dumps({"prompt": prompt if i == 0 else "hi"}).encode() for i in range(150)]
        tasks = [asyncio.create_task(client.post(url, data=BytesIO(body))) for body in bodies]
        await asyncio.wait_for(everyone.wait(), PATIENCE_S)
        release.set()
        answers = [await (await task).read() for task in tasks]
    assert {1 << 20} == {len(answer) for answer in answers}
