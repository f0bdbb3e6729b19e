"""An engine that records what it is asked, and answers as the test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer
from multidict import CIMultiDictProxy
from yarl import URL

from ucm.pd.relay import Instances, make_app

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def fields(self) -> dict[str, Any]:
        return json.loads(self.body)


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


async def _serve(app: web.Application) -> TestServer:
    server = TestServer(app)
    await server.start_server()
    return server


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    engines = {
        name: Engine(name, answering(json.dumps({"from": name}).encode()))
        for name in ("prefill", "decode")
    }
    servers: dict[str, TestServer] = {}
    for name, engine in engines.items():
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", engine.handle)
        servers[name] = await _serve(app)
        engine.url = servers[name].make_url("/")
    instances = Instances(prefill=engines["prefill"].url, decode=engines["decode"].url)
    servers["proxy"] = await _serve(make_app(instances))
    proxy = servers["proxy"].make_url("/")
    async with aiohttp.ClientSession(auto_decompress=False) as client:
        yield Bench(engines["prefill"], engines["decode"], proxy, client, servers)
    for server in reversed(servers.values()):
        await server.close()
