"""The proxy's own API keys, and the keys with which it asks each side's engines."""

from __future__ import annotations

import asyncio
import os

import aiohttp
import pytest
from yarl import URL

from tests.pd.conftest import Fleet, answering, until
from tests.pd.legs.test_websocket import REALTIME, echo
from ucm.pd import toy_proxy_server
from ucm.pd.app import make_app
from ucm.pd.flags import ProxySettings
from ucm.pd.fleet.etcd_access import EtcdAccess, etcd_endpoints
from ucm.pd.fleet.instance import Role
from ucm.pd.protocol import GENERATING
from ucm.pd.register import RegisterSettings, Registrar

MINE = {"Authorization": "Bearer mine"}
SIDES = {"prefill_api_key": "of-prefill", "decode_api_key": "of-decode"}
CLOSED = [
    *GENERATING,
    "/v1/models",
    "/tokenize",
    "/invocations",
    "/instances",
    "/sleep",
    "/metrics/",
]


async def status(fleet: Fleet, path: str, headers: dict[str, str], method: str = "POST") -> int:
    url = fleet.proxy.with_path(path)
    async with fleet.client.request(method, url, json={"prompt": "a"}, headers=headers) as response:
        return response.status


def asked(fleet: Fleet) -> list[int]:
    return [len(engine.asked) for engine in (*fleet.prefill, *fleet.decode)]


@pytest.mark.parametrize("path", CLOSED)
async def test_nobody_without_a_key_reaches_an_engine(fleet: Fleet, path):
    await fleet.start(1, 1, api_key=("mine", "yours"))

    for headers in (
        {},
        {"Authorization": "Bearer guess"},
        {"Authorization": "mine"},
        {"Authorization": "Basic mine"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer mine "[:-1] + "x"},
        {"x-api-key": ""},
        {"X-Ucm-Admin-Key": "mine"},
    ):
        assert 401 == await status(fleet, path, headers)
    assert [0, 0] == asked(fleet)
    assert 8 == await fleet.metric('ucm_pd_failed_total{reason="unauthorized"}')


@pytest.mark.parametrize("key", ["mine", "yours"])
@pytest.mark.parametrize(
    ("name", "form"),
    [("Authorization", "Bearer {}"), ("authorization", "bearer {}"), ("X-Api-Key", "{}")],
)
async def test_each_key_opens_the_proxy_in_both_headers(fleet: Fleet, key, name, form):
    await fleet.start(1, 1, api_key=("mine", "yours"))

    assert 200 == await status(fleet, "/v1/completions", {name: form.format(key)})
    assert [1, 1] == asked(fleet)


async def test_a_socket_needs_a_key_as_well(fleet: Fleet):
    await fleet.start(1, 1, api_key=("mine",), **SIDES)
    fleet.decode[0].answer = echo

    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await fleet.client.ws_connect(fleet.proxy / REALTIME)
    assert 401 == caught.value.status
    assert [0, 0] == asked(fleet)
    async with fleet.client.ws_connect(fleet.proxy / REALTIME, headers=MINE) as socket:
        assert "Bearer of-decode" == (await socket.receive_json())["key"]


@pytest.mark.parametrize("path", ["/health", "/healthcheck", "/ready", "/metrics", "/ping"])
async def test_supervisors_need_no_key(fleet: Fleet, path):
    await fleet.start(1, 1, api_key=("mine",))
    assert 200 == await status(fleet, path, {}, "GET")


async def test_a_browsers_preflight_needs_no_key(fleet: Fleet):
    await fleet.start(1, 1, api_key=("mine",))
    assert 200 == await status(fleet, "/v1/completions", {}, "OPTIONS")


async def test_a_refusal_is_in_the_clients_own_words(fleet: Fleet):
    await fleet.start(1, 1, api_key=("mine",))

    async with await fleet.post("v1/chat/completions") as response:
        assert "Bearer" == response.headers["WWW-Authenticate"]
        error = (await response.json())["error"]
        assert ("AuthenticationError", 401) == (error["type"], error["code"])
    async with await fleet.post("v1/messages") as response:
        answer = await response.json()
        assert ("error", "authentication_error") == (answer["type"], answer["error"]["type"])


async def test_no_key_of_the_proxys_own_reaches_an_engine(fleet: Fleet):
    await fleet.start(1, 1, api_key=("mine",), admin_key="admin")

    for headers, passed in (
        (MINE, {}),
        ({"x-api-key": "mine"}, {}),
        # An engine's own may come beside it.
        ({"x-api-key": "mine", "Authorization": "Bearer e"}, {"Authorization": "Bearer e"}),
        ({"x-api-key": "e", **MINE}, {"x-api-key": "e"}),
        ({"X-Ucm-Admin-Key": "admin", "Authorization": "Bearer e"}, {"Authorization": "Bearer e"}),
    ):
        assert 200 == await status(fleet, "/v1/completions", headers)
        for engine in (*fleet.prefill, *fleet.decode):
            sent = engine.asked[-1].headers
            names = ("Authorization", "x-api-key", "X-Ucm-Admin-Key")
            assert passed == {name: sent[name] for name in names if name in sent}


async def test_without_keys_engines_get_what_the_client_has_sent(fleet: Fleet):
    await fleet.start(1, 1)

    headers = {"Authorization": "Bearer e", "x-api-key": "f"}
    assert 200 == await status(fleet, "/v1/completions", headers)
    for engine in (*fleet.prefill, *fleet.decode):
        assert headers == {name: engine.asked[0].headers[name] for name in headers}


async def test_each_side_is_asked_with_its_own_key(fleet: Fleet):
    await fleet.start(2, 2, admin_key="admin", health_interval_s=0.05, **SIDES)

    async def looked() -> bool:
        return all(asked(fleet))

    await until(looked)
    for headers in ({}, {"Authorization": "Bearer of-the-client", "x-api-key": "another"}):
        assert 200 == await status(fleet, "/v1/chat/completions", headers)
        assert 200 == await status(fleet, "/v1/models", headers, "GET")
    admin = {"X-Ucm-Admin-Key": "admin", "Authorization": "Bearer of-the-client"}
    assert 200 == await status(fleet, "/sleep", admin)

    for engines, key in ((fleet.prefill, "of-prefill"), (fleet.decode, "of-decode")):
        for engine in engines:
            assert {"/health", "/sleep"} <= {each.path for each in engine.asked}
            for each in engine.asked:
                assert [f"Bearer {key}"] == each.headers.getall("Authorization"), each.path
                assert "x-api-key" not in each.headers


async def test_workers_are_asked_with_theirs(fleet: Fleet):
    worker = await fleet.engine("worker")
    await fleet.start(
        0,
        0,
        prefillers=(),
        decoders=(),
        workers=(worker.url.origin(),),
        worker_api_key="of-workers",
    )
    assert 200 == await status(fleet, "/v1/completions", MINE)
    assert "Bearer of-workers" == worker.asked[0].headers["Authorization"]


async def test_a_decoder_that_takes_over_is_asked_with_the_key_as_well(fleet: Fleet):
    await fleet.start(1, 2, **SIDES)
    for engine in fleet.decode:
        engine.answer = answering(b"{}", status=500)
    assert 500 == await status(fleet, "/v1/completions", MINE)
    assert ["Bearer of-decode"] * 2 == [
        each.headers["Authorization"] for engine in fleet.decode for each in engine.asked
    ]


async def test_keys_come_and_go_with_their_file(fleet: Fleet, tmp_path):
    mine, engines = tmp_path / "mine", tmp_path / "engines"
    mine.write_text("# who they are for\nold\n\n")
    engines.write_text("first\nsecond\n")
    await fleet.start(
        1, 1, api_key=("flag",), api_key_file=str(mine), decode_api_key_file=str(engines)
    )

    async def opens(key: str) -> bool:
        headers = {"Authorization": f"Bearer {key}"}
        return await status(fleet, "/v1/completions", headers) == 200

    async def is_sent(key: str) -> bool:
        assert await opens("flag")
        return fleet.decode[0].asked[-1].headers["Authorization"] == f"Bearer {key}"

    assert (True, True, False) == (await opens("flag"), await opens("old"), await opens("new"))
    assert await is_sent("first")

    mine.write_text("new\n")
    engines.write_text("third")
    await until(lambda: opens("new"))
    assert not await opens("old")
    await until(lambda: is_sent("third"))


@pytest.mark.parametrize("wrong", [None, "", "# none\n", "two words\n"])
async def test_a_file_that_is_gone_or_wrong_locks_nobody_out(fleet: Fleet, tmp_path, caplog, wrong):
    file = tmp_path / "keys"
    file.write_text("mine\n")
    await fleet.start(1, 1, api_key_file=str(file))
    if wrong is None:
        file.unlink()
    else:
        file.write_text(wrong)

    async def is_said() -> bool:
        return "the keys of --api-key-file stay as they are: " in caplog.text

    await until(is_said)
    assert 200 == await status(fleet, "/v1/completions", MINE)
    assert 401 == await status(fleet, "/v1/completions", {})
    assert "two words" not in caplog.text


@pytest.mark.parametrize("flag", ["api-key", "prefill-api-key", "decode-api-key", "admin-key"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"\n#\n", "has no key"),
        (b"a\nb c\n", "line 2: a key is printable ASCII without blanks"),
        ("schl\u00fcssel".encode(), "line 1: a key is printable ASCII without blanks"),
        (b"a\n" * (1 << 20), "has more than 1 MiB"),
    ],
)
def test_a_file_without_keys_is_one_line_and_status_2(tmp_path, capsys, flag, content, says):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as exited:
        toy_proxy_server.main([f"--{flag}-file", str(file), "--port", "1"])
    error = capsys.readouterr().err
    assert 2 == exited.value.code
    assert f"toy_proxy_server.py: --{flag}-file: " in error and says in error
    assert "Traceback" not in error and "b c" not in error


async def test_a_registrar_looks_at_its_instance_with_the_instances_key(fleet: Fleet, tmp_path):
    file = tmp_path / "key"
    file.write_text("of-prefill\n")
    engine = await fleet.engine("prefill")
    settings = RegisterSettings(
        role=Role.PREFILL,
        url=engine.url.origin(),
        etcd=EtcdAccess(endpoints=etcd_endpoints("127.0.0.1:1")),
        health_url=engine.url / "health",
        api_key_file=str(file),
    )
    stop = asyncio.Event()
    running = asyncio.create_task(Registrar(fleet.client, settings).run(stop))
    await asyncio.wait_for(engine.started.wait(), 10)
    stop.set()
    await running
    assert "Bearer of-prefill" == engine.asked[0].headers["Authorization"]


async def test_keys_can_come_through_a_pipe():
    """As a shell gives the output of a command, so that no file has them."""
    reading, writing = os.pipe()
    os.write(writing, b"mine\n")
    os.close(writing)
    try:
        make_app(ProxySettings(workers=(URL("http://a:1"),), api_key_file=f"/dev/fd/{reading}"))
    finally:
        os.close(reading)
