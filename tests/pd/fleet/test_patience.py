"""How long an answer may take, and what becomes of connections that nobody uses meanwhile."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.pd.conftest import Engine, Fleet

NUM_REQUESTS = 1500
NUM_CLIENTS = 8
IDLE_S = 0.01


async def state_of(fleet: Fleet, engine: Engine) -> str:
    async with fleet.client.get(fleet.proxy / "instances") as response:
        found = (await response.json())["instances"]
    return next(each["state"] for each in found if each["url"] == str(engine.url.origin()))


def slow(engine: Engine, time_s: float) -> None:
    """Its health is well, and what it makes takes so long."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path != "/health":
            await asyncio.sleep(time_s)
        return web.json_response({"from": engine.name})

    engine.answer = answer


def num_asked(fleet: Fleet) -> int:
    return sum(each.path != "/health" for engine in fleet.decode for each in engine.asked)


async def test_a_long_answer_that_is_not_streamed_is_waited_for_and_computed_once(fleet: Fleet):
    await fleet.start(1, 2, idle_timeout_s=0.2, health_interval_s=0.1, breaker_failures=1)
    for engine in fleet.decode:
        slow(engine, 1.0)

    asking = [fleet.ask(prompt=f"{i}", max_tokens=10_000) for i in range(8)]
    assert {(200, "pd")} == {(status, path) for status, _, path in await asyncio.gather(*asking)}
    assert 8 == num_asked(fleet)
    assert ["closed"] * 2 == [await state_of(fleet, engine) for engine in fleet.decode]


async def test_an_answer_beyond_its_limit_is_a_504_and_not_computed_again(fleet: Fleet):
    await fleet.start(1, 2, answer_timeout_s=0.3, health_interval_s=0.1, breaker_failures=1)
    for engine in fleet.decode:
        slow(engine, 60.0)

    for i in range(4):
        async with await fleet.post(prompt=f"{i}") as response:
            assert 504 == response.status
            assert "--answer-timeout-s, 0.3 s" in (await response.json())["error"]["message"]
    assert 4 == num_asked(fleet)
    assert 4 == await fleet.metric('ucm_pd_failed_total{reason="timeout"}')
    for engine in fleet.decode:
        assert "closed" == await state_of(fleet, engine)
        await asyncio.wait_for(engine.cancelled.wait(), 10.0)


async def test_a_stream_that_nobody_begins_is_a_504_after_two_have_been_asked(fleet: Fleet):
    await fleet.start(1, 3, idle_timeout_s=0.2)
    for engine in fleet.decode:
        engine.answer = engine.never

    async with await fleet.post(prompt="hi", stream=True) as response:
        assert 504 == response.status
        assert "--idle-timeout-s, 0.2 s" in (await response.json())["error"]["message"]
    assert 2 == num_asked(fleet)


async def test_a_stream_that_nobody_has_asked_for_ends_when_it_falls_silent(
    fleet: Fleet,
):
    """Nothing in the request says that it will be one."""
    await fleet.start(1, 1, idle_timeout_s=0.2)
    engine = fleet.decode[0]

    async def begin(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        return await engine.never(request)

    engine.answer = begin
    async with await fleet.post("v1/audio/translations", prompt="hi") as response:
        body = await asyncio.wait_for(response.read(), 10.0)
    assert body.startswith(b"data: 1\n\n")
    assert "broke off" in json.loads(body.strip().split(b"data: ")[-1])["error"]["message"]


async def serve_closing_idle_ones(fleet: Fleet, engine: Engine) -> None:
    """The same engine at an address of its own, which keeps no connection for longer.

    As uvicorn counts it, from the last answer on: a new connection gets the time that it needs to
    bring its request. aiohttp's own limit counts from the connection.
    """
    busy: set[asyncio.BaseTransport] = set()

    async def handle(request: web.Request) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        busy.add(transport)
        try:
            return await engine.handle(request)
        finally:
            busy.discard(transport)
            asyncio.get_running_loop().call_later(IDLE_S, close_if_idle, transport)

    def close_if_idle(transport: asyncio.BaseTransport) -> None:
        if transport not in busy:
            transport.close()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    server = TestServer(app)
    await server.start_server()
    fleet.servers[f"{engine.name}-idle"] = server
    engine.url = server.make_url("/")


async def ask_all(fleet: Fleet, *, pause_s: float) -> Counter[tuple[int, str]]:
    found: Counter[tuple[int, str]] = Counter()
    numbers = iter(range(NUM_REQUESTS))
    chance = random.Random(7)

    async def client() -> None:
        for i in numbers:
            async with await fleet.post(prompt=f"{i}") as response:
                await response.read()
                found[response.status, response.headers["x-ucm-pd-path"]] += 1
            await asyncio.sleep(chance.uniform(0.5, 1.5) * pause_s)

    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
    return found


async def test_an_engine_that_closes_idle_connections_costs_no_request(fleet: Fleet):
    """One of each role; requests come about when connections go."""
    prefill, decode = [await fleet.engine(name) for name in ("p", "d")]
    for engine in (prefill, decode):
        await serve_closing_idle_ones(fleet, engine)
    urls = {"prefillers": (prefill.url.origin(),), "decoders": (decode.url.origin(),)}
    await fleet.start(0, 0, **urls)

    assert {(200, "pd"): NUM_REQUESTS} == await ask_all(fleet, pause_s=IDLE_S)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_kept_connection_that_ends_under_a_request_is_no_failure(fleet: Fleet, role: str):
    await fleet.start(1, 1, breaker_failures=1)
    chance = random.Random(7)
    seen: set[asyncio.BaseTransport] = set()

    async def abort_when_reused(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        if request.transport in seen and chance.random() < 0.5:
            request.transport.abort()
            await asyncio.Event().wait()
        seen.add(request.transport)
        return web.json_response({"from": "decode0"})

    engine = (fleet.prefill if role == "prefill" else fleet.decode)[0]
    engine.answer = abort_when_reused
    assert {(200, "pd"): NUM_REQUESTS} == await ask_all(fleet, pause_s=0.0)
    assert 100 < len(engine.asked) - NUM_REQUESTS
    assert "closed" == await state_of(fleet, engine)
    assert 0 == await fleet.metric("ucm_pd_retries_total")


async def test_an_engine_that_breaks_every_connection_is_asked_twice_and_no_more(fleet: Fleet):
    await fleet.start(1, 1)
    decode = fleet.decode[0]
    assert 200 == (await fleet.ask(prompt="a"))[0]
    before = len(decode.asked)

    async def abort(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return await decode.never(request)

    decode.answer = abort
    async with await fleet.post(prompt="b") as response:
        assert 502 == response.status
    assert 2 == len(decode.asked) - before
