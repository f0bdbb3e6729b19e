"""WebSockets through the proxy, with real sockets at both ends."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from aiohttp import web

from tests.pd.conftest import Fleet, answering

REALTIME = "v1/realtime"


async def echo(request: web.Request) -> web.StreamResponse:
    """Says who asked for what, gives back what it gets, and closes with a code of its own."""
    socket = web.WebSocketResponse(protocols=("realtime",), max_msg_size=0)
    await socket.prepare(request)
    await socket.send_json({"path": request.path_qs, "key": request.headers.get("Authorization")})
    async for message in socket:
        if message.data == "leave":
            await socket.close(code=4001, message=b"as asked")
        elif message.type is aiohttp.WSMsgType.TEXT:
            await socket.send_str(message.data)
        else:
            await socket.send_bytes(message.data)
    return socket


async def test_messages_of_both_kinds_pass_both_ways(fleet: Fleet):
    await fleet.start(1, 1)
    fleet.decode[0].answer = echo

    url = fleet.proxy / REALTIME % {"model": "whisper"}
    async with fleet.client.ws_connect(
        url, headers={"Authorization": "Bearer k"}, protocols=("other", "realtime"), max_msg_size=0
    ) as socket:
        assert "realtime" == socket.protocol
        assert {"path": f"/{REALTIME}?model=whisper", "key": "Bearer k"} == (
            await socket.receive_json()
        )
        for text in ("", "caf\u00e9", "x" * (8 << 20)):
            await socket.send_str(text)
            assert text == await socket.receive_str()
        await socket.send_bytes(bytes(range(256)))
        assert bytes(range(256)) == await socket.receive_bytes()

    assert [] == fleet.prefill[0].asked
    await fleet.until_metric('ucm_pd_not_prefilled_total{reason="websocket"}', 1)


async def test_the_engines_close_reaches_the_client_with_its_code(fleet: Fleet):
    await fleet.start(1, 1)
    fleet.decode[0].answer = echo

    async with fleet.client.ws_connect(fleet.proxy / REALTIME) as socket:
        await socket.receive_json()
        await socket.send_str("leave")
        message = await socket.receive()
        assert (aiohttp.WSMsgType.CLOSE, 4001, "as asked") == (
            message.type,
            message.data,
            message.extra,
        )


async def test_a_client_that_leaves_ends_the_engines_socket(fleet: Fleet):
    await fleet.start(1, 1)
    has_ended = asyncio.Event()

    async def watch(request):
        socket = await echo(request)
        has_ended.set()
        return socket

    fleet.decode[0].answer = watch
    socket = await fleet.client.ws_connect(fleet.proxy / REALTIME)
    await socket.receive_json()
    assert 1 == await fleet.metric("ucm_pd_open_requests")
    await socket.close(code=4002)

    await asyncio.wait_for(has_ended.wait(), 10)
    await fleet.until_metric('ucm_pd_requests_total{path="decode-only"}', 1)
    assert 0 == await fleet.metric("ucm_pd_open_requests")


async def test_an_engine_that_dies_ends_the_clients_socket_with_an_error(fleet: Fleet):
    await fleet.start(1, 1)

    async def die(request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        request.transport.abort()
        return socket

    fleet.decode[0].answer = die
    async with fleet.client.ws_connect(fleet.proxy / REALTIME) as socket:
        message = await socket.receive(timeout=10)
        assert aiohttp.WSMsgType.CLOSE is message.type
        assert aiohttp.WSCloseCode.INTERNAL_ERROR == message.data


async def test_another_decoder_is_asked_before_the_socket_is_open(fleet: Fleet):
    await fleet.start(1, 3)
    await fleet.kill(fleet.decode[0])
    fleet.decode[1].answer = answering(b"{}", status=500)
    fleet.decode[2].answer = echo

    for _ in range(3):
        async with fleet.client.ws_connect(fleet.proxy / REALTIME) as socket:
            await socket.receive_json()


@pytest.mark.parametrize("role", ["client", "engine"])
async def test_pings_alone_keep_no_socket_open(fleet: Fleet, role):
    """vLLM's server pings every 20 s, and a client that waits for nothing answers."""
    await fleet.start(1, 1, websocket_idle_timeout_s=0.5)
    codes: list[int | None] = []
    heartbeat_s = 0.05

    async def silent(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(heartbeat=heartbeat_s if role == "engine" else None)
        await socket.prepare(request)
        assert aiohttp.WSMsgType.CLOSE is (await socket.receive()).type
        codes.append(socket.close_code)
        return socket

    fleet.decode[0].answer = silent
    heartbeat = heartbeat_s if role == "client" else None
    async with fleet.client.ws_connect(fleet.proxy / REALTIME, heartbeat=heartbeat) as socket:
        message = await socket.receive(timeout=20)
        assert (aiohttp.WSMsgType.CLOSE, aiohttp.WSCloseCode.GOING_AWAY) == (
            message.type,
            message.data,
        )
        assert "--websocket-idle-timeout-s" in str(message.extra)
    await fleet.until_metric('ucm_pd_failed_total{reason="timeout"}', 1)
    assert [aiohttp.WSCloseCode.GOING_AWAY] == codes
    assert 0 == await fleet.metric("ucm_pd_open_requests")


async def test_a_peer_that_takes_nothing_any_more_lets_its_engine_go(fleet: Fleet):
    """As one whose machine is gone: its connection stands, and what is sent to it is lost."""
    await fleet.start(1, 1, websocket_idle_timeout_s=0.5)
    has_ended = asyncio.Event()

    async def pour(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        try:
            while not socket.closed:
                await socket.send_bytes(bytes(1 << 20))
        finally:
            has_ended.set()
        return socket

    fleet.decode[0].answer = pour
    async with fleet.client.ws_connect(fleet.proxy / REALTIME, max_msg_size=0) as socket:
        transport = socket._response.connection.transport
        transport.pause_reading()
        await asyncio.wait_for(has_ended.wait(), 30)
        await fleet.until_metric('ucm_pd_failed_total{reason="timeout"}', 1)
        transport.abort()


async def test_a_socket_with_messages_stays_open_for_longer_than_the_limit(fleet: Fleet):
    await fleet.start(1, 1, websocket_idle_timeout_s=3.0)
    fleet.decode[0].answer = echo
    async with fleet.client.ws_connect(fleet.proxy / REALTIME) as socket:
        await socket.receive_json()
        for i in range(40):
            await asyncio.sleep(0.1)
            await socket.send_str(str(i))
            assert str(i) == await socket.receive_str()


@pytest.mark.parametrize("status", [400, 403, 404])
async def test_a_refusal_is_the_clients_answer(fleet: Fleet, status):
    await fleet.start(1, 1)
    fleet.decode[0].answer = answering(b"{}", status=status)

    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await fleet.client.ws_connect(fleet.proxy / REALTIME)
    assert status == caught.value.status


async def test_whom_nobody_can_take_now_hears_when_to_ask_again(fleet: Fleet):
    await fleet.start(1, 0)
    with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
        await fleet.client.ws_connect(fleet.proxy / REALTIME)
    assert 503 == caught.value.status
    assert caught.value.headers is not None
    assert "1" == caught.value.headers["Retry-After"]
