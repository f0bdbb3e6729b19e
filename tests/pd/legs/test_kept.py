"""What one instance keeps is found, whichever instance a client's turn would have been."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import openai
import pytest
import vllm
from yarl import URL

from tests.pd.conftest import Fleet, answering
from tests.pd.legs.handoff_parts import hang_up
from tests.pd.legs.kept_parts import Kept, made, started
from ucm.pd.legs.keepers import MAX_ID_CHARS, Keepers, Name, named_by

WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "stream": {"stream": True},
    "background": {"background": True},
    "background stream": {"background": True, "stream": True},
}
A, B = URL("http://a:1"), URL("http://b:1")


def asked(kept: list[Kept]) -> list[int]:
    return [len(each.engine.asked) for each in kept]


async def get(fleet: Fleet, path: str) -> tuple[int, bytes]:
    async with fleet.client.get(fleet.proxy.join(URL(path))) as response:
        return response.status, await response.read()


@pytest.mark.parametrize("max_remembered", [1000, 0], ids=["remembered", "looked for"])
@pytest.mark.parametrize("way", WAYS)
async def test_a_conversation_goes_on_where_it_was_begun(fleet: Fleet, way, max_remembered) -> None:
    """With the client that people use. A proxy that remembers nothing is as one that stands beside
    the one that was asked first."""
    await started(fleet, 3, max_remembered=max_remembered)
    client = openai.AsyncOpenAI(base_url=f"{fleet.proxy}v1", api_key="x", max_retries=0)
    first: str | None = None
    async with client:
        for _ in range(8):
            fields = {"previous_response_id": first, **WAYS[way]}
            answer = await client.responses.create(model="m", input="hi", **fields)
            if WAYS[way].get("stream"):
                events = [event async for event in answer]
                assert events[-1].type == "response.completed"
                answer = events[0].response
            found = await client.responses.retrieve(answer.id)
            assert (answer.id, first) == (found.id, found.previous_response_id)
            streamed = await client.responses.retrieve(answer.id, stream=True)
            assert [answer.id] * 2 == [event.response.id async for event in streamed]
            assert "cancelled" == (await client.responses.cancel(answer.id)).status
            first = answer.id
    assert all(each.path == "/v1/responses" for each in fleet.prefill[0].asked)


@pytest.mark.parametrize("piece_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("way", ["whole", "stream"])
async def test_nobody_but_its_maker_is_asked_for_a_response(fleet: Fleet, way, piece_bytes) -> None:
    kept = await started(fleet, 4)
    for each in kept:
        each.piece_bytes = piece_bytes
    for _ in range(6):
        response_id, maker = await made(fleet, **WAYS[way])
        before = asked(kept)
        for path in (response_id, f"{response_id}?starting_after=0"):
            assert 200 == (await get(fleet, f"v1/responses/{path}"))[0]
        gained = [now - then for now, then in zip(asked(kept), before, strict=True)]
        assert [2 if each.engine.name == maker else 0 for each in kept] == gained


async def test_what_nobody_has_is_missing_in_the_engines_own_words(fleet: Fleet) -> None:
    kept = await started(fleet, 3)
    for path in ("v1/responses/resp_no", "v1/responses/resp_no?stream=true"):
        status, body = await get(fleet, path)
        assert 404 == status
        assert b"Response with id 'resp_no' not found." in body
    async with await fleet.post("v1/responses", input="a", previous_response_id="resp_no") as got:
        assert 404 == got.status
    assert [3, 3, 3] == asked(kept)
    assert not any(each.responses for each in kept)


async def test_a_search_has_a_bound_and_says_so(fleet: Fleet) -> None:
    kept = await started(fleet, 4, max_searched=2)
    status, body = await get(fleet, "v1/responses/resp_no")
    assert (404, 2) == (status, sum(asked(kept)))
    assert b"2 were not asked (--max-searched)" in body


async def test_an_instance_that_drains_still_has_what_it_keeps(fleet: Fleet) -> None:
    kept = await started(fleet, 2, admin_key="key")
    response_id, maker = await made(fleet)
    (engine,) = [each.engine for each in kept if each.engine.name == maker]
    await changed(fleet, "drain", engine.url)

    assert 200 == (await get(fleet, f"v1/responses/{response_id}"))[0]
    assert maker == (await made(fleet, previous_response_id=response_id))[1]


async def changed(fleet: Fleet, change: str, url: URL) -> None:
    body = {"role": "decode", "url": str(url.origin())}
    headers = {"Authorization": "Bearer key"}
    async with fleet.client.post(
        fleet.proxy / "instances" / change, json=body, headers=headers
    ) as response:
        assert 200 == response.status


@pytest.mark.parametrize("end", ["removed", "killed"])
async def test_what_has_gone_with_its_instance_is_a_404_that_says_so(fleet: Fleet, end) -> None:
    kept = await started(fleet, 2, admin_key="key")
    response_id, maker = await made(fleet)
    (engine,) = [each.engine for each in kept if each.engine.name == maker]
    if end == "removed":
        await changed(fleet, "remove", engine.url)
    else:
        await fleet.kill(engine)

    async with fleet.client.get(fleet.proxy / "v1/responses" / response_id) as response:
        error = (await response.json())["error"]
    assert (404, 404, "NotFoundError") == (response.status, error["code"], error["type"])
    assert response_id in error["message"]
    assert str(engine.url.origin()) in error["message"]
    assert "gone" in error["message"]
    async with await fleet.post(
        "v1/responses", input="a", previous_response_id=response_id
    ) as response:
        assert 404 == response.status
    assert 2 == await fleet.metric('ucm_pd_failed_total{reason="gone"}')


async def test_a_search_says_who_can_not_be_asked_any_more(fleet: Fleet) -> None:
    kept = await started(fleet, 2)
    await fleet.kill(kept[0].engine)
    status, body = await get(fleet, "v1/responses/resp_no")
    assert 404 == status
    assert f"nobody listens at {kept[0].engine.url.origin()}".encode() in body


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(answering(b"busy", status=503), 503), (answering(b"oh", status=500), 500), (hang_up, 502)],
    ids=["busy", "fails", "breaks off"],
)
@pytest.mark.parametrize("max_remembered", [1000, 0], ids=["remembered", "looked for"])
async def test_what_its_keeper_can_not_say_now_is_not_said_to_be_gone(
    fleet: Fleet, answer, expected, max_remembered
) -> None:
    kept = await started(fleet, 3, max_remembered=max_remembered)
    response_id, maker = await made(fleet)
    (keeper,) = [each for each in kept if each.engine.name == maker]
    keeper.engine.answer = answer
    assert expected == (await get(fleet, f"v1/responses/{response_id}"))[0]

    keeper.engine.answer = keeper.answer
    assert 200 == (await get(fleet, f"v1/responses/{response_id}"))[0]


async def test_who_has_found_it_once_remembers_it(fleet: Fleet) -> None:
    kept = await started(fleet, 3)
    kept[2].responses["resp_other"] = {"id": "resp_other"}
    assert 200 == (await get(fleet, "v1/responses/resp_other"))[0]
    before = sum(asked(kept))
    assert 200 == (await get(fleet, "v1/responses/resp_other"))[0]
    assert before + 1 == sum(asked(kept))


async def test_a_lacking_response_is_held_against_no_instance(fleet: Fleet) -> None:
    """Others find what one has; that says nothing about whom to ask for other responses."""
    kept = await started(fleet, 2, max_remembered=0)
    for _ in range(6):
        response_id, _ = await made(fleet)
        await made(fleet, previous_response_id=response_id)
    before = asked(kept)
    for _ in range(4):
        await made(fleet)
    assert [2, 2] == [now - then for now, then in zip(asked(kept), before, strict=True)]


async def test_a_session_stays_where_it_was_opened(fleet: Fleet) -> None:
    kept = await started(fleet, 3)
    new = "X-Amzn-SageMaker-New-Session-Id"
    for _ in range(4):
        async with await fleet.post("invocations", requestType="NEW_SESSION") as response:
            session = response.headers[new].partition(";")[0]
        (keeper,) = [each.engine.name for each in kept if session in each.sessions]
        for _ in range(3):
            headers = {"X-Amzn-SageMaker-Session-Id": session}
            async with fleet.client.post(
                fleet.proxy / "invocations", json={"prompt": "a"}, headers=headers
            ) as response:
                assert {"from": keeper} == await response.json()


async def test_requests_are_ended_wherever_they_run_by_anybody_whom_the_engines_let(
    fleet: Fleet,
) -> None:
    await fleet.start(1, 3, admin_key="key")
    for engine in fleet.decode:
        engine.answer = answering(b"")
    path, headers = "inference/v1/abort_requests", {"Authorization": "Bearer of-the-engines"}
    body = {"request_ids": ["a"]}
    async with fleet.client.post(fleet.proxy / path, json=body, headers=headers) as response:
        assert (200, b"") == (response.status, await response.read())
    for engine in (*fleet.prefill, *fleet.decode):
        (asked_for,) = engine.asked
        assert body == asked_for.fields
        assert "Bearer of-the-engines" == asked_for.headers["Authorization"]

    fleet.decode[1].answer = answering(b"", status=401)
    async with fleet.client.post(fleet.proxy / path, json=body) as response:
        message = (await response.json())["error"]["message"]
    assert (401, "1 of 4 instances refused or failed") == (response.status, message)


# -- the names ------------------------------------------------------------------------------------


def test_the_latest_are_remembered_and_the_memory_has_a_bound() -> None:
    keepers = Keepers(2)
    names = [Name("response", f"r{i}") for i in range(4)]
    for name in names[:2]:
        keepers.note(name, A)
    assert keepers.find(names[0]) == A  # so the other one is the oldest
    keepers.note(names[2], B)
    assert [A, None, B] == [keepers.find(name) for name in names[:3]]
    keepers.note(names[0], B)
    assert keepers.find(names[0]) == B
    assert 2 == len(keepers)


def test_what_clients_make_up_takes_no_more_memory_than_an_id() -> None:
    keepers = Keepers(2)
    for id_ in ("x" * (MAX_ID_CHARS + 1), ""):
        keepers.note(Name("response", id_), A)
    assert 0 == len(keepers)


@pytest.mark.parametrize(
    ("method", "path", "fields", "name"),
    [
        ("POST", "/v1/responses", {}, None),
        ("POST", "/v1/responses", {"previous_response_id": 7}, None),
        ("POST", "/v1/responses", {"previous_response_id": "a"}, "a"),
        ("GET", "/v1/responses/a", {}, "a"),
        ("DELETE", "/v1/responses/a", {}, "a"),
        ("GET", "/v1/responses/a/input_items", {}, "a"),
        ("POST", "/v1/responses/a/cancel", {}, "a"),
        ("POST", "/v1/responses/render", {}, None),
        ("GET", "/v1/responses/", {}, None),
        ("GET", "/v1/models/a", {}, None),
    ],
)
def test_what_a_request_is_about(method, path, fields, name) -> None:
    assert (name and Name("response", name)) == named_by(method, path, {}, fields)


def test_of_each_path_of_vllms_that_has_a_name_in_it_the_proxy_knows_the_keeper() -> None:
    """Whatever has an id of its own is kept somewhere."""
    folder = Path(vllm.__file__).parent / "entrypoints"
    found = set()
    for file in folder.rglob("api_router.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in METHODS:
                path = node.args[0] if node.args else None
                if isinstance(path, ast.Constant) and "{" in str(path.value):
                    found.add((getattr(node.func, "attr", "").upper(), str(path.value)))

    assert {("GET", "/v1/responses/{response_id}")} <= found
    for method, path in found:
        assert named_by(method, re.sub(r"\{\w+\}", "x", path), {}, {}) == Name("response", "x")


METHODS = {"get", "post", "put", "patch", "delete", "websocket"}
