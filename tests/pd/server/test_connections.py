"""More clients than the proxy takes: who waits, and who has to go."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.pd.conftest import Fleet, until
from tests.pd.leftovers import LEFT_TO_THE_COLLECTOR
from tests.pd.security.certificates import Files
from tests.pd.security.test_tls import served
from ucm.pd import flags
from ucm.pd.server import listening
from ucm.pd.server.connections import MOST_CONNECTIONS, SPARED_S, default_limit

PATIENCE_S = 30.0
# asyncio leaves the transport of a handshake that failed to the garbage collector.
pytestmark = [*LEFT_TO_THE_COLLECTOR]
BODY = b'{"prompt": "a"}'


@dataclass
class Client:
    """A connection that is kept."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, method: str = "GET", path: str = "/health", body: bytes = b"") -> None:
        head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)

    async def status(self) -> int:
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
        lines = head.lower().split(b"\r\n")
        (length,) = [int(line.split()[1]) for line in lines if line.startswith(b"content-length")]
        await asyncio.wait_for(self.reader.readexactly(length), PATIENCE_S)
        return int(lines[0].split()[1])

    async def asks(self) -> int:
        self.send()
        return await self.status()

    async def is_closed(self) -> bool:
        with contextlib.suppress(asyncio.TimeoutError):
            return not await asyncio.wait_for(self.reader.read(1), 0.01)
        return False


class Clients:
    def __init__(self, port: int) -> None:
        self._port = port
        self._all: list[Client] = []

    async def one(self) -> Client:
        self._all.append(Client(*await asyncio.open_connection("127.0.0.1", self._port)))
        return self._all[-1]

    async def can_be(self) -> bool:
        with contextlib.suppress(OSError):
            await self.one()
            return True
        return False

    def leave(self) -> None:
        while self._all:
            self._all.pop().writer.close()


@pytest_asyncio.fixture
async def two(fleet: Fleet) -> AsyncIterator[Clients]:
    """Clients of a proxy that takes two."""
    worker = await fleet.engine("worker")
    fleet.decode = [worker]
    async with served(workers=(worker.url.origin(),), max_connections=2) as where:
        clients = Clients(int(where.partition(":")[2]))
        await until(clients.can_be)
        clients.leave()
        yield clients
        clients.leave()


async def test_a_new_client_takes_the_place_of_the_one_that_is_idle_for_longest(
    two: Clients, caplog: pytest.LogCaptureFixture
):
    first, second = await two.one(), await two.one()
    assert [200, 200] == [await second.asks(), await first.asks()]
    third = await two.one()
    assert 200 == await third.asks()
    await until(second.is_closed)
    assert 200 == await first.asks()
    said = [each.message for each in caplog.records if "--max-connections" in each.message]
    assert ["there are 2 connections of clients"] == [each.partition(" (")[0] for each in said]


async def test_one_that_never_asks_has_to_go_as_well(two: Clients):
    silent = [await two.one(), await two.one()]
    silent[0].writer.write(b"GET /health HTTP/1.1\r\n")
    assert 200 == await (await two.one()).asks()
    assert 200 == await (await two.one()).asks()
    for each in silent:
        await until(each.is_closed)


@pytest.mark.parametrize("shakes_hands", [True, False])
async def test_clients_that_do_not_even_speak_tls_have_to_go_as_well(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shakes_hands: bool
):
    monkeypatch.setattr(listening, "HANDSHAKE_S", 1.0)
    worker, files = await fleet.engine("worker"), Files(tmp_path, "ours")
    cert, key = files.issue("proxy")
    tls = {"ssl_certfile": cert, "ssl_keyfile": key}
    async with served(workers=(worker.url.origin(),), max_connections=2, **tls) as where:
        host, _, port = where.partition(":")
        listens = Clients(int(port))
        await until(listens.can_be)
        listens.leave()

        def silent() -> socket.socket:
            made = socket.create_connection((host, int(port)), PATIENCE_S)
            if not shakes_hands:
                return made
            return files.client().wrap_socket(made, server_hostname=host)

        held = [await asyncio.to_thread(silent) for _ in range(2)]
        # TLS itself would wait for a goodbye for 30 s, and for a handshake for 60 s.
        connecting = asyncio.open_connection(host, int(port), ssl=files.client())
        client = Client(*await asyncio.wait_for(connecting, 0.8 * PATIENCE_S))
        assert 200 == await client.asks()
        client.writer.close()
        for each in held:
            each.close()


async def test_none_is_closed_while_nobody_else_wants_in(two: Clients):
    clients = [await two.one(), await two.one()]
    await asyncio.sleep(1.2 * SPARED_S)
    assert [200, 200] == [await each.asks() for each in clients]


async def test_a_request_is_never_closed_for_another_which_waits_until_one_ends(
    two: Clients, fleet: Fleet
):
    (worker,) = fleet.decode
    usual, ends = worker.answer, asyncio.Event()

    async def held(request):
        await ends.wait()
        return await usual(request)

    worker.answer = held
    busy = [await two.one(), await two.one()]
    for each in busy:
        each.send("POST", "/v1/completions", BODY)

    async def both_run() -> bool:
        return len(worker.asked) == 2

    await until(both_run)
    third, fourth = await two.one(), await two.one()
    third.send()
    fourth.send()
    waiting = asyncio.create_task(third.status())
    await asyncio.sleep(1.5 * SPARED_S)
    assert not waiting.done()

    ends.set()
    assert [200, 200] == [await each.status() for each in busy]
    assert [200, 200] == [await waiting, await fourth.status()]


async def test_one_that_leaves_makes_room(two: Clients):
    for _ in range(5):
        clients = [await two.one(), await two.one()]
        assert [200, 200] == [await each.asks() for each in clients]
        two.leave()


@pytest.mark.parametrize(
    ("num_descriptors", "limit"), [(1024, 256), (1 << 20, MOST_CONNECTIONS), (3, 1)]
)
def test_by_default_each_client_has_descriptors_for_both_legs(
    monkeypatch: pytest.MonkeyPatch, num_descriptors: int, limit: int
):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (num_descriptors, num_descriptors))
    assert limit == default_limit()


def test_the_limit_is_a_flag():
    assert 7 == flags.parse_flags(["--max-connections", "7"], description="").max_connections
    assert flags.parse_flags([], description="").max_connections is None
