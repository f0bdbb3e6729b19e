"""What a client gets while engines fail, are full, or come and go."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from tests.pd.conftest import Engine, Fleet, answering, until

PATIENCE_S = 10.0


async def hang_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


@pytest.mark.parametrize("how", ["refused", "hangs up", "is busy", "breaks off its body"])
async def test_another_decoder_answers_before_the_first_byte(fleet: Fleet, how: str):
    async def break_off(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"{")
        return await hang_up(request)

    await fleet.start(1, 2, policy="round-robin")
    if how == "refused":
        await fleet.kill(fleet.decode[0])
    else:
        busy = answering(b"busy", status=503)
        answers = {"hangs up": hang_up, "is busy": busy, "breaks off its body": break_off}
        fleet.decode[0].answer = answers[how]

    assert [(200, "decode1")] * 3 == [(await fleet.ask(prompt=f"{i}"))[:2] for i in range(3)]


async def test_the_second_try_has_a_request_id_of_its_own(fleet: Fleet):
    """An engine that has not noticed that the first has ended would refuse the same one."""
    await fleet.start(1, 2, policy="round-robin")
    fleet.decode[0].answer = hang_up
    headers = {"X-Request-Id": "mine"}

    url = fleet.proxy / "v1/completions"
    async with fleet.client.post(url, json={"prompt": "hi"}, headers=headers) as response:
        assert "mine" == response.headers["X-Request-Id"]
    asked = [engine.asked[0].headers["X-Request-Id"] for engine in fleet.decode]
    assert ["mine", "mine-r2"] == asked


@pytest.mark.parametrize(
    ("status", "num_asked"), [(400, 1), (404, 2), (401, 2), (500, 2), (502, 2), (504, 2)]
)
async def test_the_client_hears_the_error_on_which_decoders_agree(
    fleet: Fleet, status: int, num_asked: int
):
    """At most one other is asked, and none about a request that is wrong."""
    await fleet.start(1, 3)
    for engine in fleet.decode:
        engine.answer = answering(b"no", status=status)

    async with await fleet.post(prompt="hi") as response:
        assert (status, b"no") == (response.status, await response.read())
    assert num_asked == sum(len(engine.asked) for engine in fleet.decode)


async def test_an_error_that_nobody_betters_is_the_first_ones(fleet: Fleet):
    await fleet.start(1, 2, policy="round-robin")
    fleet.decode[0].answer = answering(b"first", status=404)
    fleet.decode[1].answer = hang_up

    async with await fleet.post(prompt="hi") as response:
        assert (404, b"first") == (response.status, await response.read())


async def test_when_all_decoders_are_busy_the_client_hears_it_from_one(fleet: Fleet):
    await fleet.start(1, 2)
    for engine in fleet.decode:
        engine.answer = answering(b"busy", status=503)

    async with await fleet.post(prompt="hi") as response:
        assert (503, b"busy") == (response.status, await response.read())


async def test_a_stream_that_breaks_off_ends_with_an_error_event(fleet: Fleet):
    async def die(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"a": 1}\n\ndata: {"b"')
        return await hang_up(request)

    await fleet.start(1, 1)
    fleet.decode[0].answer = die
    async with await fleet.post(prompt="hi", stream=True) as response:
        frames = (await response.read()).strip().split(b"\n\n")
    assert b'data: {"a": 1}' == frames[0]
    error = json.loads(frames[-1].removeprefix(b"data: "))["error"]
    assert 502 == error["code"]
    assert str(fleet.decode[0].url.origin()) in error["message"]
    assert 1 == await fleet.metric('ucm_pd_failed_total{reason="broken_off"}')


async def test_an_instance_that_keeps_failing_is_left_alone_until_it_is_well(fleet: Fleet):
    await fleet.start(
        1, 2, policy="round-robin", breaker_failures=2, breaker_open_s=1000.0, health_interval_s=0.1
    )
    bad = fleet.decode[0]
    bad.answer = hang_up
    url = str(bad.url.origin())

    async def state() -> str:
        async with fleet.client.get(fleet.proxy / "instances") as response:
            found = (await response.json())["instances"]
        return next(each["state"] for each in found if each["url"] == url)

    async def is_open() -> bool:
        return await state() == "open"

    async def is_closed() -> bool:
        return await state() == "closed"

    await until(is_open)
    before = [asked.path for asked in bad.asked].count("/v1/completions")
    assert [(200, "decode1")] * 4 == [(await fleet.ask(prompt=f"{i}"))[:2] for i in range(4)]
    assert before == [asked.path for asked in bad.asked].count("/v1/completions")

    bad.answer = answering(b'{"from": "decode0"}')
    await until(is_closed)
    assert {"decode0", "decode1"} == {(await fleet.ask(prompt=f"{i}"))[1] for i in range(4)}


async def test_identical_prompts_in_flight_share_one_prefill_that_outlives_its_first_client(
    fleet: Fleet,
):
    release = asyncio.Event()

    async def slow(_: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.json_response({})

    await fleet.start(1, 1)
    prefill = fleet.prefill[0]
    prefill.answer = slow
    first = asyncio.create_task(fleet.ask(max_tokens=5))
    await prefill.started.wait()
    others = [asyncio.create_task(fleet.ask(max_tokens=i)) for i in range(3)]
    another = asyncio.create_task(fleet.ask(prompt="another"))
    await fleet.until_metric("ucm_pd_open_requests", 5)
    first.cancel()
    await asyncio.sleep(0.1)
    release.set()

    assert [(200, "decode0", "shared-prefill")] * 3 == [await each for each in others]
    assert (200, "decode0", "pd") == await another
    assert 2 == len(prefill.asked)
    assert not prefill.cancelled.is_set()


async def test_a_request_beyond_the_limits_waits_its_turn_or_is_told_when_to_come_back(
    fleet: Fleet,
):
    await fleet.start(1, 1, max_running=1, max_queued=1)
    decode = fleet.decode[0]
    release = asyncio.Event()

    async def hold(_: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.json_response({"from": "decode0"})

    decode.answer = hold
    running = asyncio.create_task(fleet.ask(prompt="a"))
    await decode.started.wait()
    waiting = asyncio.create_task(fleet.ask(prompt="b"))
    await fleet.until_metric('ucm_pd_queued{role="decode"}', 1)

    async with await fleet.post(prompt="c") as response:
        assert (503, "1") == (response.status, response.headers["Retry-After"])
        assert 503 == (await response.json())["error"]["code"]
    assert 1 == len(decode.asked)
    release.set()
    assert [200, 200] == [(await running)[0], (await waiting)[0]]


async def test_a_client_that_leaves_the_queue_gives_its_turn_to_the_next(fleet: Fleet):
    await fleet.start(1, 1, max_running=1)
    decode = fleet.decode[0]
    decode.answer = decode.never
    running = asyncio.create_task(fleet.ask(prompt="a"))
    await decode.started.wait()
    leaving = asyncio.create_task(fleet.ask(prompt="b"))
    staying = asyncio.create_task(fleet.ask(prompt="c"))
    await fleet.until_metric('ucm_pd_queued{role="decode"}', 2)
    decode.answer = answering(b'{"from": "decode0"}')
    leaving.cancel()
    running.cancel()

    assert 200 == (await asyncio.wait_for(staying, PATIENCE_S))[0]


async def test_prefill_goes_to_who_has_fewest_tokens_and_decode_to_who_runs_fewest(fleet: Fleet):
    await fleet.start(2, 2)
    held: list[Engine] = []
    for engine in (*fleet.prefill, *fleet.decode):
        engine.answer = engine.never
    long = asyncio.create_task(fleet.ask(prompt=[1] * 5000))
    while not held:
        held = [engine for engine in fleet.prefill if engine.asked]
        await asyncio.sleep(0.01)
    (other,) = [engine for engine in fleet.prefill if engine is not held[0]]
    other.answer = answering(b"{}")
    for engine in fleet.decode:
        engine.answer = answering(b'{"from": "x"}')

    for i in range(5):
        assert 200 == (await fleet.ask(prompt=[i] * 100))[0]
    assert (1, 5) == (len(held[0].asked), len(other.asked))
    assert {2, 3} == {len(engine.asked) for engine in fleet.decode}
    long.cancel()


async def test_instances_are_added_drained_and_removed_by_who_has_the_key(fleet: Fleet):
    await fleet.start(1, 1, admin_key="secret")
    new = await fleet.engine("new")
    url = {"role": "decode", "url": str(new.url.origin())}

    async def change(what: str, key: str, **fields: str) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        target = fleet.proxy / "instances" / what
        async with fleet.client.post(target, json={**url, **fields}, headers=headers) as response:
            return response.status

    assert 403 == await change("add", "wrong")
    assert 400 == await change("add", "secret", role="cook")
    assert 400 == await change("add", "secret", url="nowhere")
    assert 404 == await change("drain", "secret")
    assert 200 == await change("add", "secret")
    old = {"url": str(fleet.decode[0].url.origin())}
    assert 200 == await change("drain", "secret", **old)
    assert [(200, "new")] * 2 == [(await fleet.ask(prompt=f"{i}"))[:2] for i in range(2)]
    assert 200 == await change("remove", "secret")
    assert 503 == (await fleet.ask())[0]
    assert 200 == await change("add", "secret", **old)
    assert (200, "decode0") == (await fleet.ask())[:2]


async def test_nobody_changes_instances_of_a_proxy_without_a_key(fleet: Fleet):
    await fleet.start(1, 1)
    fields = {"role": "decode", "url": "http://a:1"}
    for key in ("", "None"):
        headers = {"Authorization": f"Bearer {key}"}
        url = fleet.proxy / "instances" / "add"
        async with fleet.client.post(url, json=fields, headers=headers) as response:
            assert 403 == response.status


async def test_ready_says_whether_a_request_would_be_answered_and_health_that_the_proxy_lives(
    fleet: Fleet,
):
    await fleet.start(1, 1, health_interval_s=0.05, breaker_failures=1, breaker_open_s=1000.0)

    async def status(path: str) -> int:
        async with fleet.client.get(fleet.proxy / path) as response:
            return response.status

    assert 200 == await status("ready")
    await fleet.kill(fleet.decode[0])

    async def is_not_ready() -> bool:
        return await status("ready") == 503

    await until(is_not_ready)
    assert 200 == await status("health")


async def test_mixed_workers_get_whole_requests(fleet: Fleet):
    workers = [await fleet.engine(f"w{i}") for i in range(2)]
    urls = tuple(each.url.origin() for each in workers)
    await fleet.start(0, 0, workers=urls, prefillers=(), decoders=())

    assert {(200, "w0", "mixed"), (200, "w1", "mixed")} == {await fleet.ask() for _ in range(2)}
    async with fleet.client.get(fleet.proxy / "healthcheck") as response:
        assert {"status": "ok", "worker_instances": 2} == await response.json()


@pytest.mark.alone
async def test_a_thousand_streams_at_once_reach_decode(fleet: Fleet):
    await fleet.start(1, 2, max_running=500)
    everyone, release = asyncio.Event(), asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        if sum(len(engine.asked) for engine in fleet.decode) == 1000:
            everyone.set()
        await release.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    for engine in fleet.decode:
        engine.answer = hold

    async def client(i: int) -> bytes:
        async with await fleet.post(prompt=f"prompt {i}", stream=True) as response:
            return await response.read()

    clients = [asyncio.create_task(client(i)) for i in range(1000)]
    await asyncio.wait_for(everyone.wait(), 60.0)
    release.set()
    assert {b"data: 1\n\ndata: [DONE]\n\n"} == {await each for each in clients}
    assert 1000 == await fleet.metric('ucm_pd_requests_total{path="pd"}')


async def test_where_the_time_went_is_in_a_header(fleet: Fleet):
    await fleet.start(1, 1)
    async with await fleet.post(prompt="hi") as response:
        stages = [each.split(";")[0] for each in response.headers["Server-Timing"].split(", ")]
        assert 32 == len(response.headers["X-Request-Id"])
    assert ["prefill", "queue", "decode-ttft"] == stages
