"""Instances come and go through a real etcd."""

from __future__ import annotations

import asyncio
import logging
import platform
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from tests.pd.conftest import Fleet, answering
from tests.pd.fleet.etcd_parts import (
    FOLLOW_TIMEOUT_S,
    GRACE_S,
    PATIENCE_S,
    RETRY_S,
    TTL_S,
    EtcdServer,
    World,
    etcd_binary,
    key_of,
    running_etcd,
)
from ucm.errors import ConfigError
from ucm.pd import register
from ucm.pd.fleet.etcd import PREFIX, Etcd, Registration
from ucm.pd.fleet.etcd_access import EtcdAccess, etcd_endpoints
from ucm.pd.fleet.etcd_gateway import EtcdError, Event
from ucm.pd.fleet.follow import changes, follow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    with running_etcd(tmp_path) as server:
        yield server


@pytest_asyncio.fixture
async def world(server: EtcdServer, fleet: Fleet) -> AsyncIterator[World]:
    async with aiohttp.ClientSession() as session:
        world = World(server, Etcd(session, server.access), fleet)
        await world.until_etcd_answers()
        following = asyncio.create_task(
            follow(
                Etcd(session, server.access, timeout_s=FOLLOW_TIMEOUT_S),
                world.see,
                retry_s=RETRY_S,
                grace_s=GRACE_S,
            )
        )
        yield world
        assert not following.done(), following
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        for registrar in world.registrars:
            registrar.kill()
            registrar.wait()


@pytest.mark.process
def test_discovery_is_tried_with_an_etcd_that_the_requirements_bring(
    monkeypatch: pytest.MonkeyPatch,
):
    if platform.machine() == "x86_64":
        monkeypatch.setenv("PATH", "/nowhere")
    done = subprocess.run([etcd_binary(), "--version"], capture_output=True, timeout=PATIENCE_S)
    assert b"etcd Version: 3" in done.stdout


@pytest.mark.process
async def test_an_instance_appears_and_is_gone_when_its_registrar_is_killed_until_a_new_one_comes(
    world: World,
):
    engine = await world.fleet.engine("a")
    key = key_of(engine, "decode")
    registrar = world.register(engine, "decode")
    await world.until(lambda: key in world.now)
    first = world.now[key]
    assert ("decode", str(engine.url.origin())) == (first.role, first.url)

    registrar.kill()
    await world.until(lambda: key not in world.now)
    world.register(engine, "decode")
    await world.until(lambda: key in world.now)
    assert first.incarnation != world.now[key].incarnation


@pytest.mark.process
async def test_an_instance_that_does_not_answer_is_gone_although_its_registrar_lives(world: World):
    engine, first = await world.registered("a")
    engine.answer = answering(b"", status=503)
    await world.until(lambda: not world.now)

    engine.answer = answering(b"")
    await world.until(lambda: key_of(engine) in world.now)
    assert first.incarnation != world.now[key_of(engine)].incarnation
    assert world.registrars[0].poll() is None


@pytest.mark.process
async def test_an_instance_that_restarts_within_its_lease_is_another_one_and_never_missing(
    world: World,
):
    engine, first = await world.registered("a")
    looks = len(engine.asked)
    engine.answer = answering(b"", status=503)
    await world.until(lambda: len(engine.asked) > looks + 1)
    engine.answer = answering(b"")
    await world.until(lambda: world.now.get(key_of(engine)) not in (None, first))

    new = world.now[key_of(engine)]
    assert ([new], [first]) == changes(world.seen[-2], world.now)
    assert all(world.seen[1:])


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_registrar_that_is_told_to_stop_takes_its_instance_with_it(
    world: World, number: signal.Signals
):
    engine, _ = await world.registered("a")
    (registrar,) = world.registrars
    registrar.send_signal(number)

    assert 0 == await asyncio.to_thread(registrar.wait, PATIENCE_S)
    assert await world.etcd.get(key_of(engine)) is None
    await world.until(lambda: not world.now)


@pytest.mark.process
async def test_while_etcd_is_gone_what_was_known_stays(
    world: World, caplog: pytest.LogCaptureFixture
):
    _, first = await world.registered("a")
    engine, _ = await world.registered("b")
    told = len(world.seen)

    def logged() -> int:
        return len([each for each in caplog.records if each.name == "ucm.pd.fleet.follow"])

    with caplog.at_level(logging.WARNING):
        world.server.kill()
        await world.until(lambda: logged() > 0)
        engine.answer = answering(b"", status=503)
        world.registrars[0].kill()
        await asyncio.sleep(20 * RETRY_S)

    assert told == len(world.seen)
    assert first in world.now.values()
    # Once, however often it was tried.
    assert 1 == logged()


@pytest.mark.process
async def test_when_etcd_comes_back_without_its_data_no_instance_that_lives_is_dropped(
    world: World,
):
    a, first = await world.registered("a")
    b, other = await world.registered("b")
    told = len(world.seen)
    world.server.kill()
    world.registrars[1].kill()
    # Longer than the leases: etcd has none to go on with.
    await asyncio.sleep(TTL_S + 0.5)
    world.server.lose_data()
    world.server.start()
    await world.until_etcd_answers()

    # Who died in the meantime is dropped, after the grace.
    await world.until(lambda: key_of(b) not in world.now)
    assert all(each[key_of(a)] == first for each in world.seen[told - 1 :])
    assert first.encode() == await world.etcd.get(key_of(a))
    # What is dropped comes back, and so does what is new.
    world.register(b)
    _, third = await world.registered("c")
    await world.until(lambda: key_of(b) in world.now)
    assert other != world.now[key_of(b)]
    assert {first, third} < set(world.now.values())


@pytest.mark.process
async def test_a_lease_that_runs_out_after_an_outage_drops_nobody_within_the_grace(world: World):
    gone = Registration("worker", "http://gone:1", "1")
    lease = await world.etcd.grant(TTL_S)
    await world.etcd.put(gone.key, gone.encode(), lease=lease)
    await world.until(lambda: gone.key in world.now)
    told = len(world.seen)
    world.server.kill()
    world.server.start()
    await world.until_etcd_answers()
    assert gone.encode() == await world.etcd.get(gone.key)
    # A first change of the watch that follows the outage; then the lease is gone, and then another.
    for number in "12":
        mark = Registration("worker", f"http://mark:{number}", number)
        await world.etcd.put(mark.key, mark.encode())
        await world.until(lambda key=mark.key: key in world.now)
        await world.etcd.revoke(lease)

    assert all(gone.key in each for each in world.seen[told - 1 :])
    await world.until(lambda: gone.key not in world.now)


@pytest.mark.process
async def test_a_registrar_that_starts_before_etcd_registers_when_it_comes(world: World):
    world.server.kill()
    engine = await world.fleet.engine("a")
    world.register(engine)
    await world.until(lambda: bool(engine.asked))
    world.server.start()

    await world.until(lambda: key_of(engine) in world.now)


@pytest.mark.process
async def test_a_record_that_makes_no_sense_hides_no_other(world: World):
    good = Registration("worker", "http://[::1]:9", "1")
    for key, value in (
        (f"{PREFIX}worker/x:1", b"nonsense"),
        (f"{PREFIX}cook/x:1", Registration("cook", "http://x:1", "1").encode()),
        (f"{PREFIX}worker/y:1", Registration("worker", "http://x:1", "1").encode()),
        (f"{PREFIX}worker/z:1", Registration("worker", "file:///z:1", "1").encode()),
    ):
        await world.etcd.put(key, value)
    await world.etcd.put(good.key, good.encode())

    assert "/ucm/instances/worker/[::1]:9" == good.key
    await world.until(lambda: bool(world.now))
    assert {good.key: good} == world.now


@pytest.mark.process
async def test_a_watch_from_before_a_compaction_is_an_error(world: World):
    for i in range(3):
        await world.etcd.put(f"{PREFIX}x", str(i).encode())
    revision = (await world.etcd.range(PREFIX)).revision
    url = f"http://{world.server.address}/v3/kv/compaction"
    async with world.fleet.client.post(url, json={"revision": str(revision)}) as response:
        assert 200 == response.status

    with pytest.raises(EtcdError, match="compacted"):
        _ = [each async for each in world.etcd.watch(PREFIX, revision=1, for_s=PATIENCE_S)]


@pytest.mark.process
async def test_the_client_puts_gets_and_sees_a_key_go_with_its_lease(world: World):
    key = f"{PREFIX}x"
    large = b"x" * (512 << 10)
    lease = await world.etcd.grant(TTL_S)
    await world.etcd.put(key, large, lease=lease)
    snapshot = await world.etcd.range(PREFIX)
    await world.etcd.revoke(lease)
    revision = snapshot.revision
    watched = world.etcd.watch(PREFIX, revision=revision, for_s=1.0)

    assert {key: large} == snapshot.values
    events = [event async for batch in watched for event in batch]
    assert [Event(key, large), Event(key, None)] == events
    assert await world.etcd.get(key) is None


@pytest.mark.process
async def test_a_lease_that_is_gone_is_told_from_one_that_is_there(world: World):
    lease = await world.etcd.grant(TTL_S)
    assert await world.etcd.keep_alive(lease)
    await world.etcd.revoke(lease)
    await world.etcd.revoke(lease)
    assert not await world.etcd.keep_alive(lease)
    with pytest.raises(EtcdError, match="lease not found"):
        await world.etcd.put(f"{PREFIX}x", b"", lease=lease)


async def test_whoever_is_no_etcd_is_an_etcd_error(fleet: Fleet):
    engine = await fleet.engine("a")
    access = EtcdAccess(endpoints=(engine.url.origin(),))
    etcd = Etcd(fleet.client, access, timeout_s=0.2)
    answers = [answering(b"[]"), answering(b"no"), answering(b"", status=500), engine.never]
    for answer in answers:
        engine.answer = answer
        with pytest.raises(EtcdError):
            await etcd.range(PREFIX)
        with pytest.raises(EtcdError):
            await etcd.keep_alive(1)
    await fleet.kill(engine)
    with pytest.raises(EtcdError):
        await etcd.grant(TTL_S)


def test_changes_are_whom_to_add_and_whom_to_remove():
    old, new, other = (Registration("decode", "http://x:1", name) for name in "abc")

    assert ([], []) == changes({"x": old}, {"x": old})
    assert ([new], [old]) == changes({"x": old}, {"x": new})
    assert ([other], [old]) == changes({"x": old, "y": new}, {"y": new, "z": other})


@pytest.mark.parametrize(
    "address", ["", "host", "host:x", "ftp://host:1", "host:1/path", "host:1,", "u:pw@host:1"]
)
def test_an_etcd_needs_a_host_and_a_port(address: str):
    with pytest.raises(ConfigError, match="host:port"):
        etcd_endpoints(address)


FLAGS = {"--role": "prefill", "--url": "http://host:7800", "--etcd-addr": "host:2379"}


@pytest.mark.parametrize(
    ("flag", "value", "names"),
    [
        ("--role", "cook", "--role"),
        ("--url", "nowhere", "nowhere"),
        ("--etcd-addr", "nowhere", "nowhere"),
        ("--health-url", "nowhere", "--health-url"),
        ("--lease-ttl-s", "0", "--lease-ttl-s"),
        ("--lease-ttl-s", "2.5", "--lease-ttl-s"),
        ("--interval-s", "soon", "--interval-s"),
        ("--interval-s", "5", "--interval-s"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line_and_status_2(
    flag: str, value: str, names: str, capsys: pytest.CaptureFixture[str]
):
    flags = {**FLAGS, flag: value}
    with pytest.raises(SystemExit) as exit_info:
        register.main([word for pair in flags.items() for word in pair])
    assert 2 == exit_info.value.code
    (line,) = capsys.readouterr().err.splitlines()
    assert names in line


@pytest.mark.process
def test_a_missing_flag_is_one_line_and_status_2_of_the_process():
    command = [sys.executable, "-m", "ucm.pd.register", "--role", "decode"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert 2 == done.returncode
    assert 1 == len(done.stderr.splitlines())
