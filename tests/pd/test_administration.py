"""What changes engines is for the admin, and for all of them."""

from __future__ import annotations

import json

import pytest
from aiohttp import web
from yarl import URL

from tests.pd.conftest import Fleet, answering
from ucm.pd.administration import PATHS, is_for_all

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
    "raw", ["/%73leep", "/sleep?level=2", "/sleep/", "/fault_tolerance%2Fapply", "http://x/sleep"]
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
