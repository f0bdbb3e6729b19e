"""An engine that records what it is asked, and answers as the test says."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
import uvloop
from aiohttp import web
from aiohttp.test_utils import TestServer
from multidict import CIMultiDictProxy
from yarl import URL

from ucm.handoff import Handoff, parse
from ucm.pd.app import make_app
from ucm.pd.flags import ProxySettings
from ucm.pd.server.serve import Runner

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


# What they test is sockets and tasks: they run on each loop that the proxy may run on.
ON_EACH_LOOP = ("test_relay", "test_known", "test_resume", "test_overlap", "test_affinity")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    del config
    is_on_each = item.path.stem in ON_EACH_LOOP or item.path.parent.name == "server"
    more = {"uvloop": uvloop.new_event_loop} if is_on_each else {}
    return {"asyncio": asyncio.new_event_loop, **more}


@pytest.fixture
def collected() -> Iterator[None]:
    yield
    gc.collect()


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def fields(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def handoff(self) -> Handoff | None:
        """What it is told of the other leg."""
        return parse(self.fields.get("kv_transfer_params"))


@dataclass
class Engine:
    """`answer` may be replaced; `cancelled` is set when a client went away during it."""

    name: str
    answer: Answer
    asked: list[Asked] = field(default_factory=list)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    url: URL = field(default_factory=URL)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.asked.append(Asked(request.method, request.path_qs, request.headers.copy(), body))
        self.started.set()
        try:
            return await self.answer(request)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def never(self, _: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError


@dataclass(frozen=True)
class Bench:
    """A proxy between two engines, and a client of the proxy."""

    prefill: Engine
    decode: Engine
    proxy: URL
    client: aiohttp.ClientSession
    servers: dict[str, TestServer]

    async def post(self, path: str = "/v1/completions", **fields: Any) -> aiohttp.ClientResponse:
        return await self.client.post(self.proxy / path.lstrip("/"), json=fields)


def answering(body: bytes, *, status: int = 200, content_type: str = "application/json") -> Answer:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body, headers={"Content-Type": content_type})

    return answer


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(1000):
        if await condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true within 10 s")


async def _serve(app: web.Application) -> TestServer:
    server = TestServer(app)
    await server.start_server(max_line_size=1 << 20, max_field_size=1 << 20)
    return server


class _ProxyServer(TestServer):
    """With the limits, and the errors, that it has as a process."""

    async def _make_runner(self, **_: Any) -> Runner:
        return Runner(self.app)


async def _serve_proxy(app: web.Application) -> TestServer:
    server = _ProxyServer(app)
    await server.start_server()
    return server


@dataclass
class Fleet:
    """A proxy before as many engines as a test wants. Closes what it has started."""

    prefill: list[Engine] = field(default_factory=list)
    decode: list[Engine] = field(default_factory=list)
    servers: dict[str, TestServer] = field(default_factory=dict)
    client: aiohttp.ClientSession = field(
        default_factory=lambda: aiohttp.ClientSession(
            auto_decompress=False, connector=aiohttp.TCPConnector(limit=0)
        )
    )
    proxy: URL = field(default_factory=URL)

    async def start(self, num_prefill: int, num_decode: int, **settings: Any) -> None:
        for role, engines, count in (
            ("prefill", self.prefill, num_prefill),
            ("decode", self.decode, num_decode),
        ):
            for i in range(count):
                engines.append(await self.engine(f"{role}{i}"))
        urls = {
            "prefillers": tuple(engine.url.origin() for engine in self.prefill),
            "decoders": tuple(engine.url.origin() for engine in self.decode),
        }
        defaults = {"min_prefill_tokens": 0, "health_interval_s": 1000.0, **urls}
        app = make_app(ProxySettings(**{**defaults, **settings}))
        self.servers["proxy"] = await _serve_proxy(app)
        self.proxy = self.servers["proxy"].make_url("/")

    async def engine(self, name: str) -> Engine:
        engine = Engine(name, answering(json.dumps({"from": name}).encode()))
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", r"/{path:[\s\S]*}", engine.handle)
        self.servers[name] = await _serve(app)
        engine.url = self.servers[name].make_url("/")
        return engine

    async def kill(self, engine: Engine) -> None:
        await self.servers[engine.name].close()

    async def post(self, path: str = "v1/completions", **fields: Any) -> aiohttp.ClientResponse:
        return await self.client.post(self.proxy / path, json=fields)

    async def ask(self, **fields: Any) -> tuple[int, str, str]:
        """Status, who has answered, and the path."""
        async with await self.post(**{"prompt": "hi", **fields}) as response:
            answer = await response.json(content_type=None)
            path = response.headers["x-ucm-pd-path"]
            return response.status, answer.get("from", ""), path

    async def metric(self, line: str) -> float:
        """The value of the line that begins so; 0 if there is none."""
        async with self.client.get(self.proxy / "metrics") as response:
            text = await response.text()
        return sum(float(each.split()[-1]) for each in text.splitlines() if each.startswith(line))

    async def until_metric(self, line: str, at_least: float) -> None:
        async def is_there() -> bool:
            return await self.metric(line) >= at_least

        await until(is_there)

    async def close(self) -> None:
        await self.client.close()
        for server in reversed(self.servers.values()):
            await server.close()


@pytest_asyncio.fixture
async def fleet() -> AsyncIterator[Fleet]:
    fleet = Fleet()
    yield fleet
    await fleet.close()


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    engines = {
        name: Engine(name, answering(json.dumps({"from": name}).encode()))
        for name in ("prefill", "decode")
    }
    servers: dict[str, TestServer] = {}
    for name, engine in engines.items():
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", r"/{path:[\s\S]*}", engine.handle)
        servers[name] = await _serve(app)
        engine.url = servers[name].make_url("/")
    settings = ProxySettings(
        prefillers=(engines["prefill"].url.origin(),),
        decoders=(engines["decode"].url.origin(),),
        min_prefill_tokens=0,
        health_interval_s=1000.0,
    )
    servers["proxy"] = await _serve(make_app(settings))
    proxy = servers["proxy"].make_url("/")
    async with aiohttp.ClientSession(auto_decompress=False) as client:
        yield Bench(engines["prefill"], engines["decode"], proxy, client, servers)
    for server in reversed(servers.values()):
        await server.close()
