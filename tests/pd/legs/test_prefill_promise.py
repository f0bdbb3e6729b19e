"""What prefill hands over to decode, by way of the proxy."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from tests.pd.conftest import Answer, Fleet, answering
from tests.pd.legs.handoff_parts import (
    BODY,
    RECEIPT,
    TOLD_RECEIPT,
    after,
    giving,
    hang_up,
    send,
    streaming,
    told,
)
from ucm.handoff import Wanted

MODES = pytest.mark.parametrize("mode", ["chain", "overlap"])


@pytest.mark.parametrize("receipt", [RECEIPT, b'{"do_remote_prefill":true}', b"{}"])
async def test_what_prefill_hands_over_reaches_decode_untouched_behind_the_clients_own_bytes(
    fleet: Fleet, receipt: bytes
):
    await fleet.start(1, 1)
    fleet.prefill[0].answer = giving(receipt)

    assert (200, b'{"from": "decode0"}', "pd") == await send(fleet)
    assert [TOLD_RECEIPT.replace(RECEIPT, receipt)] == [each.body for each in fleet.decode[0].asked]
    assert [Wanted()] == told(fleet.prefill[0])


@pytest.mark.parametrize(
    "answer",
    [
        answering(b'{"choices": []}'),
        giving(b"null"),
        giving(b'"text"'),
        answering(b"kv_transfer_params"),
        answering(b'{"kv_transfer_params": {"ucm": 1}}', status=400),
        hang_up,
    ],
    ids=["absent", "null", "no-object", "no-json", "refused", "hangs-up"],
)
async def test_where_prefill_hands_nothing_over_decode_gets_the_clients_bytes(
    fleet: Fleet, answer: Answer
):
    await fleet.start(1, 1)
    fleet.prefill[0].answer = answer

    assert 200 == (await send(fleet))[0]
    assert [BODY] == [each.body for each in fleet.decode[0].asked]


@MODES
async def test_a_request_without_a_prefill_reaches_decode_as_it_came(fleet: Fleet, mode: str):
    await fleet.start(1, 1, handoff=mode, min_prefill_tokens=128)
    bodies = [BODY, b'{"prompt": "hi", "echo": true, "kv_transfer_params": {"a": 1}}']

    assert ["skip-short", "decode-only"] == [(await send(fleet, body))[2] for body in bodies]
    assert bodies == [each.body for each in fleet.decode[0].asked]


@MODES
async def test_mixed_workers_are_told_nothing(fleet: Fleet, mode: str):
    worker = await fleet.engine("w")
    await fleet.start(
        0, 0, workers=(worker.url.origin(),), prefillers=(), decoders=(), handoff=mode
    )

    assert (200, b'{"from": "w"}', "mixed") == await send(fleet)
    assert [BODY] == [each.body for each in worker.asked]


async def test_what_prefill_hands_over_is_not_compressed_whatever_the_client_takes(fleet: Fleet):
    await fleet.start(1, 1)
    await send(fleet, **{"Accept-Encoding": "gzip"})

    asked = [engine.asked[0] for engine in (*fleet.prefill, *fleet.decode)]
    assert ["identity", "gzip"] == [each.headers["Accept-Encoding"] for each in asked]


async def test_who_shares_a_prefill_shares_what_it_hands_over(fleet: Fleet):
    await fleet.start(1, 1)
    release = asyncio.Event()
    fleet.prefill[0].answer = after(release, giving(RECEIPT))
    requests = [asyncio.create_task(send(fleet)) for _ in range(3)]
    await fleet.until_metric("ucm_pd_open_requests", 3)
    await fleet.prefill[0].started.wait()
    release.set()

    paths = sorted([(await each)[2] for each in requests])
    assert ["pd", "shared-prefill", "shared-prefill"] == paths
    assert [TOLD_RECEIPT] * 3 == [each.body for each in fleet.decode[0].asked]


@MODES
async def test_who_goes_on_with_a_stream_is_told_nothing(fleet: Fleet, mode: str):
    await fleet.start(1, 2, policy="round-robin", handoff=mode)
    event = b'data: {"choices": [{"index": 0, "text": "a"}]}\n\n'

    async def die(request: web.Request) -> web.StreamResponse:
        return await hang_up(request)

    async def first(request: web.Request) -> web.StreamResponse:
        return await streaming(event, then=lambda: die(request))(request)

    one, two = fleet.decode
    one.answer, two.answer = first, streaming(event, b"data: [DONE]\n\n")
    fleet.prefill[0].answer = giving(RECEIPT)
    async with await fleet.post(prompt="hi ", stream=True) as response:
        assert (await response.read()).endswith(b"data: [DONE]\n\n")
    assert {"prompt": "hi a", "stream": True} == two.asked[0].fields
