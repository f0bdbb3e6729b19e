"""Clients that ask without a pause, while instances come and go through a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from examples.cluster.processes import GuardedProcess, HttpServer, free_port
from tests.pd.engine_process import MARK, PATH, EngineServer, text_of, words
from tests.pd.fleet.etcd_parts import (
    TTL_S,
    EtcdServer,
    registrar_command,
    running_cluster,
    running_etcd,
)

pytestmark = [pytest.mark.process, pytest.mark.alone]

PATIENCE_S = 30.0
NUM_CLIENTS = 4
MAX_TOKENS = 8


@dataclass
class Member:
    """An engine and the registrar beside it."""

    role: str
    engine: EngineServer
    registrar: GuardedProcess

    @property
    def url(self) -> str:
        return str(self.engine.url)

    async def kill(self) -> None:
        """As if its machine went down."""
        for process in (self.engine, self.registrar):
            await asyncio.to_thread(process.kill)


@dataclass
class Site:
    """etcds, a proxy that follows them, members, and clients that are never content."""

    folder: Path
    etcds: list[EtcdServer]
    proxy: HttpServer
    session: aiohttp.ClientSession
    started: contextlib.ExitStack
    lease_ttl_s: int
    stops: bool = False
    num_answers: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        return ",".join(each.address for each in self.etcds)

    def engine(self, port: int | None = None) -> EngineServer:
        engine = EngineServer(self.folder, port=port)
        self.started.callback(engine.kill)
        return engine

    def join(self, role: str, port: int | None = None) -> Member:
        engine = self.engine(port)
        log = self.folder / f"registrar-{engine.port}.log"
        url, ttl_s = str(engine.url), self.lease_ttl_s
        command = registrar_command(url, role, self.address, lease_ttl_s=ttl_s)
        registrar = GuardedProcess(command, log=log)
        self.started.callback(registrar.kill)
        return Member(role, engine, registrar)

    async def one_client(self, name: int) -> None:
        """Until all are to stop; none leaves before its answer."""
        for i in itertools.count():
            if self.stops:
                return
            prompt = f"question {i} of {name} {MARK}"
            fields = {"prompt": prompt, "max_tokens": MAX_TOKENS, "stream": bool((i + name) % 2)}
            url = f"http://127.0.0.1:{self.proxy.port}{PATH}"
            status, body = 0, b""
            try:
                async with self.session.post(url, json=fields) as response:
                    status, body = response.status, await response.read()
                if status != 200 or text_of(body) != "".join(words(prompt, MAX_TOKENS)):
                    self.problems.append(f"{status} {body!r}")
            except (aiohttp.ClientError, LookupError, ValueError, AssertionError) as error:
                self.problems.append(f"{error!r} {status} {body!r}")
            self.num_answers += 1

    def story(self) -> str:
        """What proxy and registrars say but for requests: a lease that ran out shows as `has left`
        and a 503 after it, a fault of the proxy in no other line."""
        logs = sorted(self.folder.glob("registrar-*.log"))
        lines = [line for line in self.proxy.log_text().splitlines() if '"request":' not in line]
        return "\n".join([*lines, *(f"{each.name}: {each.read_text()}" for each in logs)])

    async def instances(self) -> dict[str, dict[str, Any]]:
        """Of the proxy, by their urls."""
        url = f"http://127.0.0.1:{self.proxy.port}/instances"
        async with self.session.get(url) as response:
            found = (await response.json())["instances"]
        return {each["url"]: each for each in found}

    async def until(self, condition: Callable[[dict[str, dict[str, Any]]], bool]) -> None:
        """With traffic before and after it, and no request that has failed."""
        for _ in range(int(PATIENCE_S / 0.05)):
            if condition(await self.instances()):
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError(f"it did not come true: {await self.instances()}")
        # Each client has one that was sent before this and ends behind it, and others.
        enough = self.num_answers + 3 * NUM_CLIENTS
        for _ in range(int(PATIENCE_S / 0.05)):
            if self.num_answers >= enough:
                break
            await asyncio.sleep(0.05)
        assert [] == self.problems, self.story()
        assert self.num_answers >= enough

    async def until_at_work(self, *members: Member) -> None:
        def at_work(now: dict[str, dict[str, Any]]) -> bool:
            found = [now.get(each.url, {}) for each in members]
            return all(each.get("state") == "closed" and each["served"] for each in found)

        await self.until(at_work)

    async def until_open(self, member: Member) -> None:
        await self.until(lambda now: now.get(member.url, {}).get("state") == "open")

    async def until_gone(self, member: Member) -> None:
        await self.until(lambda now: member.url not in now)


@pytest.fixture
def num_etcds() -> int:
    return 1


@pytest.fixture
def etcds(tmp_path: Path, num_etcds: int) -> Iterator[list[EtcdServer]]:
    if num_etcds == 1:
        with running_etcd(tmp_path) as etcd:
            yield [etcd]
    else:
        with running_cluster(tmp_path) as etcds:
            yield etcds


@pytest.fixture
def proxy(tmp_path: Path, etcds: list[EtcdServer]) -> Iterator[HttpServer]:
    port = free_port()
    command = [
        *[sys.executable, "-m", "ucm.pd.toy_proxy_server", "--port", str(port)],
        *["--host", "127.0.0.1", "--min-prefill-tokens", "0"],
        *["--etcd-addr", ",".join(each.address for each in etcds)],
        # One failure is enough, and only a new incarnation brings an instance back.
        *["--breaker-failures", "1", "--breaker-open-s", "1000", "--health-interval-s", "1000"],
    ]
    with HttpServer(command, port=port, log=tmp_path / "proxy.log") as proxy:
        proxy.wait_ready(PATIENCE_S)
        yield proxy
        assert "Traceback" not in proxy.log_text()


@pytest_asyncio.fixture
async def site(
    tmp_path: Path, etcds: list[EtcdServer], proxy: HttpServer, lease_ttl_s: int
) -> AsyncIterator[Site]:
    """Nobody is there yet."""
    with contextlib.ExitStack() as started:
        async with aiohttp.ClientSession() as session:
            yield Site(tmp_path, etcds, proxy, session, started, lease_ttl_s)


@contextlib.asynccontextmanager
async def traffic(site: Site, *members: Member) -> AsyncIterator[None]:
    """Clients that ask, from when these are there."""
    urls = {each.url for each in members}
    for _ in range(int(PATIENCE_S / 0.05)):
        if set(await site.instances()) == urls:
            break
        await asyncio.sleep(0.05)
    clients = [asyncio.create_task(site.one_client(i)) for i in range(NUM_CLIENTS)]
    try:
        await site.until_at_work(*members)
        yield
    finally:
        site.stops = True
        await asyncio.wait_for(asyncio.gather(*clients), PATIENCE_S)
    assert [] == site.problems, site.story()


# So long that no instance is missing before it is back: its new incarnation takes its place.
@pytest.mark.parametrize("lease_ttl_s", [600])
async def test_no_request_fails_while_instances_come_die_come_back_and_leave(site: Site):
    prefiller, decoder = site.join("prefill"), site.join("decode")
    async with traffic(site, prefiller, decoder):
        other_prefiller, other_decoder = site.join("prefill"), site.join("decode")
        await site.until_at_work(other_prefiller, other_decoder)

        await asyncio.to_thread(decoder.engine.kill)
        await site.until_open(decoder)
        await site.until(lambda _: "does not answer" in decoder.registrar.log_text())
        site.engine(decoder.engine.port)
        await site.until_at_work(decoder)

        await other_prefiller.kill()
        await site.until_open(other_prefiller)
        site.join("prefill", other_prefiller.engine.port)
        await site.until_at_work(other_prefiller)

        prefiller.registrar.send_signal(signal.SIGTERM)
        await site.until_gone(prefiller)
        await asyncio.to_thread(prefiller.engine.kill)
        await site.until_at_work(decoder, other_prefiller, other_decoder)


# As a registrar has it by itself.
@pytest.mark.parametrize("lease_ttl_s", [5])
@pytest.mark.parametrize(
    "loses_data",
    [
        pytest.param(False, id="as-it-was", marks=pytest.mark.long),
        pytest.param(True, id="empty"),
    ],
)
async def test_no_request_fails_while_etcd_is_away_instances_die_and_etcd_is_back(
    site: Site, loses_data: bool
):
    living = [site.join("prefill"), site.join("decode")]
    async with traffic(site, *living):
        dying = [site.join("prefill"), site.join("decode")]
        await site.until_at_work(*dying)

        (etcd,) = site.etcds
        etcd.kill()
        await site.until_at_work(*living, *dying)
        for each in dying:
            await each.kill()
            await site.until_open(each)

        if loses_data:
            etcd.lose_data()
        etcd.start()
        new = site.join("decode")
        await site.until_at_work(new)
        # After the grace that those who are missing get.
        for each in dying:
            await site.until_gone(each)
        await site.until_at_work(*living, new)


@pytest.mark.parametrize("lease_ttl_s", [5])
@pytest.mark.parametrize("num_etcds", [3])
@pytest.mark.parametrize(
    "end",
    [
        pytest.param(EtcdServer.kill, id="killed"),
        pytest.param(EtcdServer.stand_still, id="silent", marks=pytest.mark.long),
    ],
)
async def test_no_request_fails_and_none_is_lost_while_the_etcd_in_use_is(
    site: Site, end: Callable[[EtcdServer], None]
):
    """All of them use the first one. The others go on, and so does what is registered there."""
    living = [site.join("prefill"), site.join("decode")]
    async with traffic(site, *living):
        end(site.etcds[0])
        new = site.join("decode")
        await site.until_at_work(*living, new)
        # Longer than the leases, of which none may have run out.
        ends_s = time.monotonic() + site.lease_ttl_s + 2.0
        while time.monotonic() < ends_s:
            assert {each.url for each in (*living, new)} == set(await site.instances())
            await asyncio.sleep(0.1)

        new.registrar.send_signal(signal.SIGTERM)
        await site.until_gone(new)
        await site.until_at_work(*living)
    assert "another etcd, " in site.proxy.log_text()


@pytest.mark.parametrize("lease_ttl_s", [TTL_S])
async def test_a_lease_that_runs_out_under_traffic_is_a_missing_instance_and_no_broken_answer(
    site: Site,
):
    prefiller, decoder = site.join("prefill"), site.join("decode")

    async def until(condition: Callable[[], Awaitable[bool]]) -> None:
        for _ in range(int(PATIENCE_S / 0.05)):
            if await condition():
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"it did not come true: {site.story()}")

    async def is_missed() -> bool:
        return bool(site.problems)

    async def is_back() -> bool:
        return decoder.url in await site.instances()

    async with traffic(site, prefiller, decoder):
        decoder.registrar.send_signal(signal.SIGSTOP)
        await until(is_missed)
        decoder.registrar.send_signal(signal.SIGCONT)
        await until(is_back)
        # Those that were sent before it was back.
        enough = site.num_answers + 2 * NUM_CLIENTS

        async def are_answered() -> bool:
            return site.num_answers >= enough

        await until(are_answered)
        problems = site.problems.copy()
        site.problems.clear()
        await site.until_at_work(prefiller, decoder)
    others = {each for each in problems if not re.match("503 .*no decode instance", each)}
    assert set() == others, site.story()
