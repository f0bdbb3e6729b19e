"""A request of several bytes, and engines that hand over, wait, stream or hang up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from tests.pd.conftest import Answer, Engine, Fleet, answering, until
from ucm.handoff import Expected, Receipt, parse

PATIENCE_S = 10.0
BODY = b'{ "prompt": "caf\\u00e9 \xc3\xa9",  "max_tokens":20\n}\n'
RECEIPT = b'{"ucm" :{"kind":"receipt","tokens":5e0}, "more":[1,\n2]}'
TOLD_RECEIPT = BODY.replace(b"\n}", b'\n,"kv_transfer_params":' + RECEIPT + b"}")
PIECES = [b'data: {"a": 1}\n\nda', b"ta: {}\n\nda", b"ta: \xff\xfe\n\n", b"data: [DONE]\n\n"]


def a_receipt(*, is_whole: bool) -> Receipt:
    some = "ab" * 32
    return Receipt(
        namespace=some, block_tokens=128, tokens=129, key=some, is_whole=is_whole, issued_s=1.5
    )


def giving(receipt: bytes) -> Answer:
    return answering(b'{"id": "x", "kv_transfer_params": ' + receipt + b', "choices": []}')


def after(event: asyncio.Event, answer: Answer) -> Answer:
    async def wait(request: web.Request) -> web.StreamResponse:
        await event.wait()
        return await answer(request)

    return wait


def unless_expecting(engine: Engine, answer: Answer) -> Answer:
    """An engine that waits for what it expects, for ever."""

    async def wait(request: web.Request) -> web.StreamResponse:
        told = parse(json.loads(await request.read()).get("kv_transfer_params"))
        return await (engine.never(request) if told == Expected() else answer(request))

    return wait


def streaming(*pieces: bytes, then: Callable[[], Awaitable[object]] | None = None) -> Answer:
    """`then` is awaited behind the first piece."""

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for i, piece in enumerate(pieces):
            await response.write(piece)
            if i == 0 and then is not None:
                await then()
        return response

    return stream


async def hang_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def send(fleet: Fleet, body: bytes = BODY, **headers: str) -> tuple[int, bytes, str]:
    """Status, body and path."""
    url = fleet.proxy / "v1/completions"
    async with fleet.client.post(url, data=body, headers=headers) as response:
        return response.status, await response.read(), response.headers["x-ucm-pd-path"]


def told(engine: Engine) -> list[Any]:
    return [asked.handoff for asked in engine.asked]


async def until_no_prefill_runs(fleet: Fleet) -> None:
    async def none_runs() -> bool:
        return 0 == await fleet.metric('ucm_pd_instance_running{role="prefill"')

    await until(none_runs)
