"""One instance of two fails, fast or slowly, while its /health is well: clients don't notice.

The engines are processes, and what fails is their work, not their sockets: fewest requests are
where requests fail fastest, so whoever counts only those sends everything there.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator

import aiohttp
import pytest

from tests.pd.conftest import Fleet
from tests.pd.engine_process import (
    MARK,
    PATH,
    SLOW,
    EngineServer,
    Fault,
    engines_that_serve,
    text_of,
    words,
)

pytestmark = [pytest.mark.process, pytest.mark.alone]

NUM_REQUESTS = 200
NUM_CLIENTS = 8
MAX_TOKENS = 4
SILENT_AFTER_S = 0.5


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EngineServer]]:
    """One that fails, one that is well, and one of the other role."""
    with engines_that_serve(tmp_path_factory.mktemp("engines"), 3) as servers:
        yield servers


async def set_fault(engine: EngineServer, fault: str) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(engine.url / "fault", data=fault) as response,
    ):
        assert response.ok


async def start(fleet: Fleet, engines: list[EngineServer], role: str, **settings: object) -> None:
    faulty, well, other = (each.url for each in engines)
    urls = {"prefillers": (other,), "decoders": (other,)}
    urls["prefillers" if role == "prefill" else "decoders"] = (faulty, well)
    await fleet.start(0, 0, **{**urls, "health_interval_s": 0.1, **settings})


async def ask_all(
    fleet: Fleet,
    *,
    stream: bool | None = None,
    num_requests: int = NUM_REQUESTS,
    max_tokens: int = MAX_TOKENS,
) -> list[tuple[int, str, bool]]:
    """Status, path, and whether the answer is the right one, of many requests, some at a time."""
    numbers = iter(range(num_requests))
    found = []

    async def client() -> None:
        for i in numbers:
            prompt = f"question {i} {MARK}"
            fields = {
                "prompt": prompt,
                "max_tokens": max_tokens,
                "stream": i % 2 == 0 if stream is None else stream,
            }
            async with await fleet.post(PATH.lstrip("/"), **fields) as response:
                body = await response.read()
                path = response.headers["x-ucm-pd-path"]
                is_right = response.ok and text_of(body) == "".join(words(prompt, max_tokens))
                found.append((response.status, path, is_right))

    await asyncio.gather(*(client() for _ in range(NUM_CLIENTS)))
    return found


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_clients_do_not_notice_an_instance_that_fails_while_another_is_well(
    fleet: Fleet, engines: list[EngineServer], role: str, fault: Fault
):
    await start(fleet, engines, role, silent_after_s=SILENT_AFTER_S)
    await set_fault(engines[0], fault.value)
    try:
        found = await ask_all(fleet)
    finally:
        await set_fault(engines[0], "")
    assert {(200, "pd", True)} == set(found)
    assert NUM_REQUESTS == len(found)


@pytest.mark.parametrize(
    ("role", "policy"),
    [
        pytest.param("prefill", "least-loaded", marks=pytest.mark.long),
        ("decode", "round-robin"),
    ],
)
async def test_without_any_flag_an_instance_that_hangs_costs_nobody_an_answer(
    fleet: Fleet, engines: list[EngineServer], role: str, policy: str
):
    await start(fleet, engines, role, policy=policy)
    await set_fault(engines[0], Fault.HANGS.value)
    try:
        found = await asyncio.wait_for(ask_all(fleet), timeout=60)
    finally:
        await set_fault(engines[0], "")
    assert {(200, "pd", True)} == set(found)
    assert NUM_REQUESTS == len(found)


async def test_a_prefiller_that_hangs_is_left_alone_where_decode_does_not_wait_for_it(
    fleet: Fleet, engines: list[EngineServer]
):
    await start(fleet, engines, "prefill", handoff="overlap", breaker_open_s=60.0)

    async def served() -> list[int]:
        async with fleet.client.get(fleet.proxy / "instances") as response:
            found = (await response.json())["instances"]
        return [each["served"] for each in found if each["role"] == "prefill"]

    await set_fault(engines[0], Fault.HANGS.value)
    try:
        found = await ask_all(fleet, stream=True, num_requests=40, max_tokens=100)
        await asyncio.sleep(1.0)  # those that were under way are given up
        before = await served()
        found += await ask_all(fleet, stream=True, num_requests=40, max_tokens=100)
        after = await served()
    finally:
        await set_fault(engines[0], "")
    assert {True} == {is_right for _, _, is_right in found}
    hanging, well = (now - then for now, then in zip(after, before, strict=True))
    assert (hanging, well) == (0, 40)


@pytest.mark.parametrize(("role", "stream"), [("prefill", True), ("decode", False)])
async def test_instances_that_take_longer_than_they_did_are_not_taken_for_ones_that_stand_still(
    fleet: Fleet, engines: list[EngineServer], role: str, stream: bool
):
    """One request of each is asked elsewhere; then it is known how long answers take."""
    await start(fleet, engines, role, silent_after_s=SILENT_AFTER_S)
    for engine in engines[:2]:
        await set_fault(engine, SLOW)
    try:
        found = []
        for _ in range(3):
            found += await ask_all(fleet, stream=stream, num_requests=NUM_CLIENTS)
            retries = await fleet.metric(f'ucm_pd_retries_total{{role="{role}"}}')
            async with fleet.client.get(fleet.proxy / "instances") as response:
                states = {each["state"] for each in (await response.json())["instances"]}
            assert {"closed"} == states
            assert 1 <= retries <= 2
    finally:
        for engine in engines[:2]:
            await set_fault(engine, "")
    assert {(200, "pd", True)} == set(found)


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_who_waits_for_an_instance_that_stands_still_is_answered_by_another(
    fleet: Fleet, engines: list[EngineServer], role: str
):
    """Its host accepts connections, and nothing ends them; only its health tells."""
    await start(fleet, engines, role)
    (process,) = engines[0].processes()
    process.send_signal(signal.SIGSTOP)
    try:
        found = await ask_all(fleet)
    finally:
        process.send_signal(signal.SIGCONT)
    assert {(200, "pd", True)} == set(found)


async def test_an_instance_that_fails_draws_no_traffic_and_gets_its_share_when_it_is_well_again(
    fleet: Fleet, engines: list[EngineServer]
):
    await start(fleet, engines, "decode", breaker_open_s=0.3)

    async def served() -> list[int]:
        async with fleet.client.get(fleet.proxy / "instances") as response:
            found = (await response.json())["instances"]
        return [each["served"] for each in found if each["role"] == "decode"]

    for fault in (Fault.ANSWERS_500, Fault.ANSWERS_404):
        before = await served()
        await set_fault(engines[0], fault.value)
        await ask_all(fleet)
        during = await served()
        faulty, well = (now - then for now, then in zip(during, before, strict=True))
        assert faulty < well / 4, (faulty, well)
        await set_fault(engines[0], "")
        await asyncio.sleep(0.5)
        await ask_all(fleet)
        after = await served()
        once_faulty, other = (now - then for now, then in zip(after, during, strict=True))
        assert once_faulty > other / 4, (once_faulty, other)
