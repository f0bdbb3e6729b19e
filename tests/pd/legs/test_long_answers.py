"""What an engine answers without end fills no memory of the proxy's."""

from __future__ import annotations

import asyncio
import hashlib

import pytest
from aiohttp import web

from tests.pd.conftest import Answer, Fleet

PATIENCE_S = 30.0
MIB = 1 << 20


def long(*, num_bytes: int, has_length: bool = True) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        if has_length:
            response.content_length = num_bytes
        await response.prepare(request)
        for _ in range(num_bytes // MIB):
            await response.write(b"x" * MIB)
        return response

    return answer


@pytest.mark.parametrize("has_length", [False, True])
async def test_a_prefill_answer_above_the_bound_is_unreadable_and_decode_answers(
    fleet: Fleet, has_length: bool
):
    await fleet.start(1, 1, max_answer_mb=1)
    # The bytes are a good answer to a proxy that reads them all.
    fleet.prefill[0].answer = long(num_bytes=64 * MIB, has_length=has_length)

    asked = await asyncio.wait_for(fleet.ask(), PATIENCE_S)

    assert (200, "decode0", "decode-only") == asked
    assert 1 == await fleet.metric('ucm_pd_not_prefilled_total{reason="unreadable"}')


async def test_a_prefill_answer_right_at_the_bound_is_read(fleet: Fleet):
    await fleet.start(1, 1, max_answer_mb=1)
    fleet.prefill[0].answer = long(num_bytes=MIB)

    assert (200, "decode0", "pd") == await asyncio.wait_for(fleet.ask(), PATIENCE_S)


async def test_a_decode_answer_above_the_bound_reaches_the_client_as_it_comes(fleet: Fleet):
    """Its client has the beginning before the engine has said the end."""
    await fleet.start(1, 1, max_answer_mb=1)
    may_end = asyncio.Event()

    async def halting(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.content_length = 4 * MIB
        await response.prepare(request)
        await response.write(b"a" * MIB)
        await may_end.wait()
        await response.write(b"b" * 3 * MIB)
        return response

    fleet.decode[0].answer = halting
    async with await asyncio.wait_for(fleet.post(prompt="hi"), PATIENCE_S) as response:
        assert 200 == response.status
        assert 4 * MIB == response.content_length
        first = await asyncio.wait_for(response.content.readexactly(1000), PATIENCE_S)
        may_end.set()
        rest = await asyncio.wait_for(response.read(), PATIENCE_S)
    digest = hashlib.sha256(b"a" * MIB + b"b" * 3 * MIB).digest()
    assert digest == hashlib.sha256(first + rest).digest()
