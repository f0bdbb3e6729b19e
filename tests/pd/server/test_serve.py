"""The proxy as a process: how it starts, what it refuses, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from examples.cluster.processes import HttpServer, free_port
from tests.pd.conftest import Bench, Fleet, answering

PATIENCE_S = 30.0


@contextlib.asynccontextmanager
async def proxy_of(bench: Bench, folder: Path, *flags: str) -> AsyncIterator[HttpServer]:
    port = free_port()
    ports = ["--prefiller-port", str(bench.prefill.url.port), "--decoder-port"]
    ports += [str(bench.decode.url.port), "--port", str(port), "--min-prefill-tokens", "0"]
    command = [sys.executable, "-m", "ucm.pd.toy_proxy_server", *ports, *flags]
    with HttpServer(command, port=port, log=folder / "log", health_path="/healthcheck") as proxy:
        await asyncio.to_thread(proxy.wait_ready, PATIENCE_S)
        yield proxy


async def begin_and_hold(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    await response.write(b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n')
    await asyncio.Event().wait()
    return response


@pytest.mark.process
@pytest.mark.parametrize("signals", [1, 2])
async def test_whoever_is_left_when_the_proxy_ends_hears_that_it_stops(
    tmp_path: Path, bench: Bench, signals: int
):
    """After the time for it, or at the second signal: a stream by an event, the others by a 503."""
    timeout_s = "1" if signals == 1 else "1000"
    async with proxy_of(bench, tmp_path, "--shutdown-timeout-s", timeout_s) as proxy:
        url = f"http://localhost:{proxy.port}"

        async def ask(**fields: object) -> tuple[int, str | None, bytes]:
            fields = {"prompt": json.dumps(fields), **fields}
            async with bench.client.post(f"{url}/v1/completions", json=fields) as response:
                after = response.headers.get("Retry-After")
                return response.status, after, await response.read()

        bench.decode.answer = begin_and_hold
        stream = asyncio.create_task(ask(stream=True))
        await asyncio.wait_for(bench.decode.started.wait(), PATIENCE_S)
        await asyncio.sleep(0.2)
        bench.decode.started.clear()
        bench.decode.answer = bench.decode.never
        whole = asyncio.create_task(ask(stream=False))
        await asyncio.wait_for(bench.decode.started.wait(), PATIENCE_S)
        bench.prefill.answer = bench.prefill.never
        bench.prefill.started.clear()
        waiting = asyncio.create_task(ask(user="waits for prefill"))
        await asyncio.wait_for(bench.prefill.started.wait(), PATIENCE_S)

        for _ in range(signals):
            proxy.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)

        status, _, body = await asyncio.wait_for(stream, PATIENCE_S)
        last = body.strip().split(b"\n\n")[-1]
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert (200, 503, "the proxy is stopping") == (status, error["code"], error["message"])
        for other in (whole, waiting):
            status, after, body = await asyncio.wait_for(other, PATIENCE_S)
            assert (503, "1") == (status, after)
            assert "stopping" in json.loads(body)["error"]["message"]
        assert 0 == await asyncio.to_thread(proxy.wait, PATIENCE_S)
        lines = proxy.log_text()
        assert 3 == lines.count('"failure":"stopping"')
        assert "client_left" not in lines


@pytest.mark.process
async def test_while_it_drains_what_runs_goes_on_and_nothing_new_comes_in(
    tmp_path: Path, bench: Bench
):
    release = asyncio.Event()

    async def hold(_: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.json_response({"from": "decode"})

    bench.decode.answer = hold
    async with proxy_of(bench, tmp_path, "--shutdown-timeout-s", "1000") as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        kept = aiohttp.ClientSession()
        async with kept, kept.get(f"http://127.0.0.1:{proxy.port}/health") as response:
            assert response.ok
            await response.read()
            running = asyncio.create_task(
                bench.client.post(f"http://localhost:{proxy.port}/v1/completions", json={})
            )
            await asyncio.wait_for(bench.decode.started.wait(), PATIENCE_S)
            proxy.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            async with kept.get(f"{url}/ready") as response:
                assert (503, "close") == (response.status, response.headers["Connection"])
            with pytest.raises(aiohttp.ClientConnectorError):
                await kept.get(f"{url}/ready")
        release.set()
        async with await asyncio.wait_for(running, PATIENCE_S) as response:
            assert 200 == response.status
            await response.read()
        assert 0 == await asyncio.to_thread(proxy.wait, PATIENCE_S)


def start(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ucm.pd.toy_proxy_server", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


@pytest.mark.process
def test_where_it_can_not_listen_it_says_so_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        in_use = start("--host", "127.0.0.1", "--port", port)
    unknown = start("--host", "nowhere.invalid")
    foreign = start("--host", "192.0.2.1", "--port", port)
    for done, what in ((in_use, port), (unknown, "nowhere.invalid"), (foreign, "192.0.2.1")):
        *before, last = done.stderr.splitlines()
        assert 2 == done.returncode
        assert last.startswith("toy_proxy_server.py: ")
        assert what in last
        assert not any("Traceback" in line for line in before)


@pytest.mark.process
@pytest.mark.parametrize(
    ("host", "where", "answers_at"),
    [
        ("::", "[::]", ["127.0.0.1", "[::1]"]),
        ("[::1]", "[::1]", ["[::1]"]),
        ("0.0.0.0", "0.0.0.0", ["127.0.0.1"]),
    ],
)
async def test_it_listens_where_the_host_says(
    tmp_path: Path, bench: Bench, host: str, where: str, answers_at: list[str]
):
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    port = free_port()
    command = [sys.executable, "-m", "ucm.pd.toy_proxy_server", "--host", host]
    log = tmp_path / "log"
    with HttpServer([*command, "--port", str(port)], port=port, log=log) as proxy:

        async def answers(address: str) -> bool:
            try:
                async with bench.client.get(f"http://{address}:{port}/health") as response:
                    return response.ok
            except aiohttp.ClientConnectionError:
                return False

        for _ in range(300):
            if proxy.is_running and all([await answers(each) for each in answers_at]):
                assert f"listening on http://{where}:{port}" in log.read_text()
                return
            await asyncio.sleep(0.1)
        raise AssertionError(proxy.log_tail())


async def test_headers_and_queries_of_64_kib_pass_both_ways(fleet: Fleet):
    await fleet.start(1, 1)
    long = "x" * (64 << 10)

    async def echo(request: web.Request) -> web.StreamResponse:
        return web.json_response({}, headers={"X-Back": request.headers["X-There"]})

    for engine in (*fleet.prefill, *fleet.decode):
        engine.answer = echo
    url = fleet.proxy.with_path("/v1/completions").with_query(q=long)
    session = aiohttp.ClientSession(max_line_size=1 << 20, max_field_size=1 << 20)
    async with (
        session,
        session.post(url, json={"prompt": "hi"}, headers={"X-There": long}) as response,
    ):
        assert (200, long) == (response.status, response.headers["X-Back"])
        assert "pd" == response.headers["x-ucm-pd-path"]
    assert f"/v1/completions?q={long}" == fleet.decode[0].asked[0].path


@pytest.mark.parametrize(
    "request_text",
    [
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * (160 << 10) + b"\r\n\r\n",
        b"this is no HTTP\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: many\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999999\r\n\r\n",
    ],
    ids=["long header", "no HTTP", "bad length", "too large"],
)
async def test_what_the_http_library_refuses_is_refused_in_openai_s_form(
    fleet: Fleet, request_text: bytes
):
    await fleet.start(1, 1)
    assert fleet.proxy.host is not None
    reader, writer = await asyncio.open_connection(fleet.proxy.host, fleet.proxy.port)
    writer.write(request_text)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
    # Not until the end: a server waits for a body before it closes.
    (length,) = re.findall(rb"(?i)content-length: (\d+)", head)
    body = await asyncio.wait_for(reader.readexactly(int(length)), PATIENCE_S)
    writer.close()
    status = int(head.split()[1])
    assert b"application/json" in head
    assert status in (400, 413)
    assert status == json.loads(body)["error"]["code"]


async def test_an_answer_that_can_not_be_read_is_asked_of_one_other_and_counts_against_nobody(
    fleet: Fleet,
):
    await fleet.start(1, 3, breaker_failures=1)
    for engine in fleet.decode:
        engine.answer = answering(b"{}", content_type="a" * (1 << 20))

    async with await fleet.post(prompt="hi") as response:
        assert 502 == response.status
        assert "unreadable" in (await response.json())["error"]["message"]
    assert 2 == sum(len(engine.asked) for engine in fleet.decode)
    assert 3 == await fleet.metric('ucm_pd_instance_state{role="decode",state="closed"')


@pytest.mark.process
async def test_a_socket_hears_that_the_proxy_stops_and_so_does_its_engine(
    tmp_path: Path, bench: Bench
):
    codes: asyncio.Queue[int | None] = asyncio.Queue()

    async def hold(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str("open")
        await socket.receive()
        codes.put_nowait(socket.close_code)
        return socket

    bench.decode.answer = hold
    async with proxy_of(bench, tmp_path, "--shutdown-timeout-s", "0.5") as proxy:
        url = f"http://localhost:{proxy.port}/v1/realtime"
        async with bench.client.ws_connect(url) as socket:
            assert "open" == await socket.receive_str()
            proxy.send_signal(signal.SIGTERM)
            message = await socket.receive(timeout=PATIENCE_S)
            assert (aiohttp.WSMsgType.CLOSE, 1001, "the proxy is stopping") == (
                message.type,
                message.data,
                message.extra,
            )
        assert 1001 == await asyncio.wait_for(codes.get(), PATIENCE_S)
        assert 0 == await asyncio.to_thread(proxy.wait, PATIENCE_S)
