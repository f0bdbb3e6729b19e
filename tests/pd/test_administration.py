"""What changes engines is for the admin, and for all of them."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from yarl import URL

from tests.pd.conftest import Fleet, answering
from ucm.pd.administration import PATHS, is_for_all
from ucm.pd.app import STOPPING

PATIENCE_S = 20.0
ADMIN = {"Authorization": "Bearer secret"}


async def two_and_two(fleet: Fleet) -> None:
    await fleet.start(2, 2, admin_key="secret")


@pytest.mark.parametrize("path", sorted(PATHS))
async def test_nobody_without_the_key_reaches_what_changes_an_engine(fleet: Fleet, path):
    await two_and_two(fleet)

    for key in ({}, {"Authorization": "Bearer guess"}, {"X-Ucm-Admin-Key": "guess", **ADMIN}):
        async with fleet.client.post(fleet.proxy.with_path(path), headers=key) as response:
            assert 403 == response.status
            assert "--admin-key" in (await response.json())["error"]["message"]

    assert [[]] * 4 == [engine.asked for engine in (*fleet.prefill, *fleet.decode)]


async def test_without_an_admin_key_there_is_no_administration(fleet: Fleet):
    await fleet.start(1, 1)
    for headers in ({}, ADMIN, {"Authorization": "Bearer "}, {"X-Ucm-Admin-Key": ""}):
        async with fleet.client.post(fleet.proxy / "sleep", headers=headers) as response:
            assert 403 == response.status
    assert [] == fleet.decode[0].asked


@pytest.mark.parametrize(
    "raw",
    [
        *["/%73leep", "/sleep?level=2", "/sleep/", "/fault_tolerance%2Fapply", "http://x/sleep"],
        *["/sleep%0A", "/sleep%20", "/sleep/%0d%0a"],
    ],
)
def test_no_spelling_of_a_path_goes_around_the_key(raw):
    assert is_for_all(raw)


@pytest.mark.parametrize("raw", ["/v1/models", "/sleeping", "/%2573leep", "/v1/completions"])
def test_what_is_no_administration_passes(raw):
    assert not is_for_all(raw)


async def test_every_instance_of_both_roles_is_asked_and_heard(fleet: Fleet):
    await two_and_two(fleet)
    fleet.prefill[0].answer = answering(
        b"Success: LoRA adapter 'a' added", content_type="text/plain"
    )
    body = {"lora_name": "a", "lora_path": "/a"}
    headers = {"X-Ucm-Admin-Key": "secret", "Authorization": "Bearer of-the-engines"}

    url = fleet.proxy / "v1/load_lora_adapter" % {"x": "1"}
    async with fleet.client.post(url, json=body, headers=headers) as response:
        assert 200 == response.status
        assert "Server-Timing" not in response.headers
        said = (await response.json())["instances"]

    assert ["prefill", "prefill", "decode", "decode"] == [each["role"] for each in said]
    assert {"from": "decode1"} == said[3]["answer"]
    assert said[0]["answer"].startswith("Success")
    for engine in (*fleet.prefill, *fleet.decode):
        (asked,) = engine.asked
        assert ("POST", "/v1/load_lora_adapter?x=1", body) == (
            asked.method,
            asked.path,
            json.loads(asked.body),
        )
        assert "Bearer of-the-engines" == asked.headers["Authorization"]
        assert "X-Ucm-Admin-Key" not in asked.headers


async def test_the_proxys_own_key_reaches_no_engine(fleet: Fleet):
    await two_and_two(fleet)
    async with fleet.client.get(fleet.proxy / "is_sleeping", headers=ADMIN) as response:
        assert 200 == response.status
    for engine in (*fleet.prefill, *fleet.decode):
        assert "Authorization" not in engine.asked[0].headers


async def test_one_that_refuses_or_is_away_is_named(fleet: Fleet):
    await two_and_two(fleet)

    async def refuse(_):
        return web.json_response({"error": "no"}, status=400)

    fleet.prefill[1].answer = refuse
    away = URL(fleet.decode[0].url)
    await fleet.kill(fleet.decode[0])

    async with fleet.client.post(fleet.proxy / "sleep", headers=ADMIN) as response:
        assert 400 == response.status
        said = (await response.json())["instances"]

    assert [200, 400, 502, 200] == [each["status"] for each in said]
    assert str(away.origin()) == said[2]["url"].rstrip("/")


@pytest.mark.parametrize("is_begun", [False, True])
async def test_one_that_never_ends_its_answer_is_named_and_holds_up_nobody_for_good(
    fleet: Fleet, is_begun: bool
):
    await fleet.start(1, 2, admin_key="secret", idle_timeout_s=0.5)

    async def silent(request: web.Request) -> web.StreamResponse:
        if is_begun:
            response = web.StreamResponse()
            await response.prepare(request)
            await response.write(b"{")
        return await fleet.decode[1].never(request)

    fleet.decode[1].answer = silent

    asking = fleet.client.post(fleet.proxy / "sleep", headers=ADMIN)
    async with await asyncio.wait_for(asking, PATIENCE_S) as response:
        assert 504 == response.status
        said = (await response.json())["instances"]
    assert [200, 200, 504] == [each["status"] for each in said]
    assert "--idle-timeout-s" in said[2]["answer"]

    # Nobody is told who the instances are.
    asking = fleet.client.post(fleet.proxy / "inference/v1/abort_requests", json={})
    async with await asyncio.wait_for(asking, PATIENCE_S) as response:
        assert 504 == response.status
        assert str(fleet.decode[1].url.port) not in await response.text()


async def test_one_that_is_lost_to_its_health_checks_is_waited_for_no_longer(fleet: Fleet):
    await fleet.start(1, 1, admin_key="secret", health_interval_s=0.1)
    fleet.decode[0].answer = fleet.decode[0].never

    asking = fleet.client.post(fleet.proxy / "sleep", headers=ADMIN)
    async with await asyncio.wait_for(asking, PATIENCE_S) as response:
        assert 502 == response.status
        said = (await response.json())["instances"]
    assert [200, 502] == [each["status"] for each in said]
    assert "health checks fail" in said[1]["answer"]


async def test_an_answer_without_an_end_is_read_as_far_as_it_is_shown(fleet: Fleet):
    await fleet.start(1, 1, admin_key="secret")

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * (1 << 16))

    fleet.decode[0].answer = endless
    asking = fleet.client.post(fleet.proxy / "server_info", headers=ADMIN)
    async with await asyncio.wait_for(asking, PATIENCE_S) as response:
        said = (await response.json())["instances"]
    assert "x" * (64 << 10) == said[1]["answer"]


async def test_the_end_of_the_proxy_waits_for_what_goes_to_all_instances(fleet: Fleet):
    await fleet.start(1, 1, admin_key="secret")
    may_answer = asyncio.Event()

    async def late(_: web.Request) -> web.StreamResponse:
        await may_answer.wait()
        return web.json_response({})

    fleet.decode[0].answer = late
    asking = asyncio.create_task(fleet.client.post(fleet.proxy / "sleep", headers=ADMIN))
    await asyncio.wait_for(fleet.decode[0].started.wait(), PATIENCE_S)
    drained = asyncio.create_task(fleet.servers["proxy"].app[STOPPING].drained())
    await asyncio.sleep(0)
    assert not drained.done()

    may_answer.set()
    async with await asyncio.wait_for(asking, PATIENCE_S) as response:
        assert 200 == response.status
    await asyncio.wait_for(drained, PATIENCE_S)
