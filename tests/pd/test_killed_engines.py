"""kill -9 of one engine in each stage of its work, behind a proxy with two of each role."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.pd.conftest import Fleet, until
from tests.pd.engine_process import (
    MARK,
    PATH,
    START_TIMEOUT_S,
    WORDS_BEFORE_HOLD,
    EngineServer,
    Stage,
    engines_that_serve,
    said,
    text_of,
    text_of_event,
    words,
)

pytestmark = pytest.mark.process

NUM_CLIENTS = 4
MAX_TOKENS = 8
# Nothing runs there, but connections are kept for what may come.
IDLE = "idle"
STAGES = (IDLE, *Stage)


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EngineServer]]:
    """Three engines that nobody kills, for all tests."""
    with engines_that_serve(tmp_path_factory.mktemp("engines"), 3) as servers:
        yield servers


@pytest.fixture
def victim(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineServer]:
    stage = request.getfixturevalue("stage")
    server = EngineServer(tmp_path, hold=None if stage == IDLE else stage)
    try:
        server.wait_ready(START_TIMEOUT_S)
        yield server
    finally:
        server.kill()


async def start(
    fleet: Fleet, victim: EngineServer, well: list[EngineServer], role: str, **settings: Any
) -> None:
    """The victim is the first of its role, and gets every second request."""
    first, second, third = (each.url for each in well)
    pair, others = (victim.url, first), (second, third)
    pairs = (pair, others) if role == "prefill" else (others, pair)
    prefillers, decoders = pairs
    await fleet.start(
        0, 0, prefillers=prefillers, decoders=decoders, policy="round-robin", **settings
    )


async def ask(fleet: Fleet, prompt: str, *, stream: bool, **more: Any) -> tuple[int, bytes]:
    fields = {"prompt": prompt, "max_tokens": MAX_TOKENS, "stream": stream, **more}
    async with await fleet.post(PATH.lstrip("/"), **fields) as response:
        return response.status, await response.read()


def asking(
    fleet: Fleet, *, stream: bool, **more: Any
) -> dict[str, asyncio.Task[tuple[int, bytes]]]:
    """As many clients at once as it takes for two to be at the victim."""
    prompts = [f"question {i} {MARK}" for i in range(NUM_CLIENTS)]
    return {each: asyncio.create_task(ask(fleet, each, stream=stream, **more)) for each in prompts}


async def until_held(victim: EngineServer, stage: Stage) -> None:
    async def is_held() -> bool:
        return NUM_CLIENTS // 2 == victim.log_text().count(said(stage))

    await until(is_held)


def connections_of(server: EngineServer) -> int:
    (process,) = server.processes()
    return [each.status for each in process.net_connections()].count(psutil.CONN_ESTABLISHED)


async def answers_of(
    clients: dict[str, asyncio.Task[tuple[int, bytes]]],
) -> dict[str, tuple[int, str]]:
    found = {prompt: await client for prompt, client in clients.items()}
    return {prompt: (status, text_of(body)) for prompt, (status, body) in found.items()}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_every_client_gets_its_whole_answer_when_an_engine_is_killed(
    fleet: Fleet,
    victim: EngineServer,
    well: list[EngineServer],
    role: str,
    stage: str,
    stream: bool,
):
    await start(fleet, victim, well, role)
    clients = asking(fleet, stream=stream)
    if isinstance(stage, Stage):
        await until_held(victim, stage)
    else:
        await answers_of(clients)
        assert connections_of(victim) > 0
    await asyncio.to_thread(victim.kill)
    if stage == IDLE:
        clients = asking(fleet, stream=stream)

    expected = {each: (200, "".join(words(each, MAX_TOKENS))) for each in clients}
    assert expected == await answers_of(clients)
    # What a stream lacks at its end needs no engine.
    ends = role == "decode" and stage == Stage.BEFORE_THE_END and stream
    assert ends == (0 == await fleet.metric(f'ucm_pd_retries_total{{role="{role}"}}'))
    resumed = role == "decode" and stage == Stage.IN_THE_MIDDLE and stream
    assert (2 if resumed else 0) == await fleet.metric('ucm_pd_requests_total{path="resumed"}')
    assert 0 == await fleet.metric("ucm_pd_failed_total")


@pytest.mark.parametrize("stage", [Stage.IN_THE_MIDDLE])
async def test_with_no_resume_the_streams_of_a_killed_decoder_end_with_an_error_event(
    fleet: Fleet, victim: EngineServer, well: list[EngineServer], stage: Stage
):
    await start(fleet, victim, well, "decode", resume=False)
    clients = asking(fleet, stream=True)
    await until_held(victim, stage)
    await asyncio.to_thread(victim.kill)

    whole, broken = 0, 0
    for prompt, client in clients.items():
        status, body = await client
        assert 200 == status
        if body.endswith(b"data: [DONE]\n\n"):
            assert "".join(words(prompt, MAX_TOKENS)) == text_of(body)
            whole += 1
            continue
        # What it had begun of the next event is of no use to anybody.
        *events, error = body.strip().split(b"\n\n")
        assert words(prompt, WORDS_BEFORE_HOLD) == [text_of_event(each) for each in events]
        assert 502 == json.loads(error[6:])["error"]["code"]
        broken += 1
    assert (2, 2) == (whole, broken)


@pytest.mark.parametrize("stage", [Stage.BEFORE_THE_END])
async def test_a_stream_whose_usage_was_asked_for_is_not_whole_without_it(
    fleet: Fleet, victim: EngineServer, well: list[EngineServer], stage: Stage
):
    await start(fleet, victim, well, "decode")
    clients = asking(fleet, stream=True, stream_options={"include_usage": True})
    await until_held(victim, stage)
    await asyncio.to_thread(victim.kill)

    bodies = [(await client)[1] for client in clients.values()]
    assert 2 == sum(body.endswith(b"data: [DONE]\n\n") for body in bodies)
    assert 2 == sum(b'"code":502' in body for body in bodies)
