"""A proxy without file descriptors: what clients hear, whom it blames, and what it logs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from examples.cluster.processes import HttpServer, free_port
from tests.pd.conftest import Engine, Fleet, until
from ucm.pd.server.listening import raise_descriptor_limit

PATIENCE_S = 30.0
MAX_DESCRIPTORS = 64


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Those that are open stay so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def never_keep(engine: Engine) -> None:
    """Each request needs a connection of its own."""
    usual = engine.answer

    async def answer(request: web.Request) -> web.StreamResponse:
        response = await usual(request)
        response.force_close()
        return response

    engine.answer = answer


async def test_a_lack_of_descriptors_is_a_503_and_no_fault_of_an_instance(fleet: Fleet):
    await fleet.start(2, 2, policy="round-robin", breaker_failures=1, breaker_open_s=1000.0)
    for engine in fleet.prefill + fleet.decode:
        never_keep(engine)
    assert 200 == (await fleet.ask(prompt="before"))[0]

    with no_descriptors():
        async with await fleet.post(prompt="during") as response:
            error = (await response.json())["error"]
            status, after = response.status, response.headers.get("Retry-After")
    assert (503, 503, "1") == (status, error["code"], after)
    assert "the proxy has no file descriptor or port left" in error["message"]

    states = {line["state"] for line in await _instances(fleet)}
    assert {"closed"} == states
    assert 0 == await fleet.metric("ucm_pd_retries_total{")
    assert 1 == await fleet.metric('ucm_pd_not_prefilled_total{reason="out_of_sockets"}')
    assert 200 == (await fleet.ask(prompt="after"))[0]


async def test_a_websocket_without_a_descriptor_is_a_503_and_no_fault_of_an_instance(
    fleet: Fleet,
):
    await fleet.start(1, 2, breaker_failures=1, breaker_open_s=1000.0)
    headers = {"Upgrade": "websocket", "Connection": "Upgrade"}
    assert [] != await _instances(fleet)  # a connection that is kept

    with no_descriptors():
        async with fleet.client.get(fleet.proxy / "v1/realtime", headers=headers) as response:
            assert 503 == response.status
    assert {"closed"} == {line["state"] for line in await _instances(fleet)}


async def test_a_look_that_the_proxy_could_not_take_says_nothing_about_an_instance(fleet: Fleet):
    await fleet.start(1, 1, breaker_failures=1, breaker_open_s=1000.0, health_interval_s=0.05)
    for engine in fleet.prefill + fleet.decode:
        never_keep(engine)
    await asyncio.sleep(0.2)

    with no_descriptors():
        await asyncio.sleep(0.5)
    assert {"closed"} == {line["state"] for line in await _instances(fleet)}


async def _instances(fleet: Fleet) -> list[dict[str, str]]:
    async with fleet.client.get(fleet.proxy / "instances") as response:
        found: list[dict[str, str]] = (await response.json())["instances"]
        return found


def test_the_soft_limit_of_descriptors_becomes_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
    try:
        raise_descriptor_limit()
        assert (hard, hard) == resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.process
async def test_more_clients_than_descriptors_wait_and_do_not_fill_the_log(tmp_path: Path):
    port, log = free_port(), tmp_path / "log"
    proxy_command = [sys.executable, "-m", "ucm.pd.toy_proxy_server", "--port", str(port)]
    # Or the others would wait, without descriptors of their own.
    proxy_command += ["--max-connections", str(4 * MAX_DESCRIPTORS)]
    proxy_command += ["--prefiller-port", str(free_port()), "--decoder-port", str(free_port())]
    limited = f'ulimit -n {MAX_DESCRIPTORS}; exec "$@"'
    command = ["sh", "-c", limited, "sh", *proxy_command]
    with HttpServer(command, port=port, log=log, health_path="/healthcheck") as proxy:
        await asyncio.to_thread(proxy.wait_ready, PATIENCE_S)
        num_lines_before = len(log.read_text().splitlines())
        with contextlib.ExitStack() as clients:
            for _ in range(2 * MAX_DESCRIPTORS):
                clients.enter_context(socket.create_connection(("localhost", port), PATIENCE_S))

            async def is_said() -> bool:
                text = log.read_text()
                return "system resource" in text or "can't accept" in text

            await until(is_said)
            await asyncio.sleep(2.0)
        url = f"http://localhost:{port}/healthcheck"
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        async with aiohttp.ClientSession(timeout=timeout) as client, client.get(url) as response:
            assert 200 == response.status
        said = log.read_text().splitlines()[num_lines_before:]
    assert 1 <= sum("can't accept a connection" in line for line in said)
    assert 20 > len(said)
