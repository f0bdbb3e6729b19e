"""Which prefill instances are asked when one fails, and when decode is left to itself."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from tests.pd.conftest import Answer, Engine, Fleet, answering

PATIENCE_S = 10.0


async def test_another_prefill_instance_is_asked_when_one_can_not_be_reached(fleet: Fleet):
    await fleet.start(2, 1, policy="round-robin")
    await fleet.kill(fleet.prefill[0])

    for i in range(4):
        assert (200, "decode0", "pd") == await fleet.ask(prompt=f"prompt {i}")
    assert 4 == len(fleet.prefill[1].asked)
    # After that it was left alone.
    assert 3 == await fleet.metric('ucm_pd_retries_total{role="prefill"}')


@pytest.mark.parametrize(
    ("status", "reason", "num_asked"),
    [(400, "4xx", 1), (401, "4xx", 2), (404, "4xx", 2), (429, "4xx", 2), (500, "5xx", 2)],
)
async def test_a_prefill_that_all_refuse_is_counted_and_decode_answers(
    fleet: Fleet, status: int, reason: str, num_asked: int
):
    """Another one is asked where it may know better: not about a request that is wrong."""
    await fleet.start(2, 1)
    for engine in fleet.prefill:
        engine.answer = answering(b"no", status=status)

    assert (200, "decode0", "decode-only") == await fleet.ask()
    assert num_asked == sum(len(engine.asked) for engine in fleet.prefill)
    assert 1 == await fleet.metric(f'ucm_pd_not_prefilled_total{{reason="{reason}"}}')


async def test_a_prefill_that_is_late_everywhere_is_cancelled_and_decode_answers(fleet: Fleet):
    """One other is asked, because the first has had nothing for anybody; not a third one."""
    await fleet.start(3, 1, prefill_timeout_s=0.2)
    for engine in fleet.prefill:
        engine.answer = engine.never

    assert (200, "decode0", "decode-only") == await fleet.ask()
    asked = [engine for engine in fleet.prefill if engine.asked]
    assert 2 == len(asked)
    for engine in asked:
        await asyncio.wait_for(engine.cancelled.wait(), PATIENCE_S)
    assert 1 == await fleet.metric('ucm_pd_not_prefilled_total{reason="timeout"}')


async def test_a_prefill_that_is_late_where_others_are_answered_is_not_computed_twice(fleet: Fleet):
    await fleet.start(2, 1, prefill_timeout_s=1.0, policy="round-robin")
    long: list[Engine] = []
    has_begun = asyncio.Event()

    def patient(engine: Engine) -> Answer:
        async def answer(request: web.Request) -> web.StreamResponse:
            if json.loads(await request.read())["prompt"] == "long":
                long.append(engine)
                has_begun.set()
                return await engine.never(request)
            return web.json_response({})

        return answer

    for engine in fleet.prefill:
        engine.answer = patient(engine)
    late = asyncio.create_task(fleet.ask(prompt="long"))
    await asyncio.wait_for(has_begun.wait(), PATIENCE_S)
    for i in range(2):
        assert "pd" == (await fleet.ask(prompt=f"short {i}"))[2]

    assert (200, "decode0", "decode-only") == await late
    assert 1 == len(long)
