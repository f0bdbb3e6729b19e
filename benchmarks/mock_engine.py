"""An engine that computes nothing: it answers at once, after a delay, or never.

aiohttp's low-level server: engines should cost as little as can be.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Final

from aiohttp import web

# Headers of the client reach both legs.
DELAY_HEADER: Final = "x-bench-delay-s"
# Where the request is never answered: in PREFILL or DECODE, or by decode with an endless STREAM.
HOLD_HEADER: Final = "x-bench-hold"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
STREAM: Final = "stream"
ANSWER: Final = b'{"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":" yes"}]}'
EVENT: Final = b'data: {"id":"cmpl-1","choices":[{"index":0,"text":" yes"}]}\n\n'
EVENT_S: Final = 0.01
# How many requests are held now, and when those that were held heard that their client had left.
HELD_PATH: Final = "/held"
BACKLOG: Final = 4096


class MockEngine:
    def __init__(self, role: str) -> None:
        self._stages = (PREFILL,) if role == PREFILL else (DECODE, STREAM)
        self._num_held = 0
        self._heard_s: list[float] = []

    async def serve(self, port: int) -> None:
        """Until it is killed."""
        server = web.Server(self._answer, access_log=None, handler_cancellation=True)
        loop = asyncio.get_running_loop()
        await loop.create_server(server, "127.0.0.1", port, backlog=BACKLOG)
        await asyncio.Event().wait()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == HELD_PATH:
            return web.json_response({"held": self._num_held, "heard_s": self._heard_s})
        await request.read()
        stage = request.headers.get(HOLD_HEADER)
        if stage in self._stages:
            return await self._hold(request, is_stream=stage == STREAM)
        delay_s = float(request.headers.get(DELAY_HEADER, "0"))
        if delay_s:
            await asyncio.sleep(delay_s)
        return web.Response(body=ANSWER, content_type="application/json")

    async def _hold(self, request: web.BaseRequest, *, is_stream: bool) -> web.StreamResponse:
        self._num_held += 1
        try:
            if is_stream:
                response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await response.prepare(request)
                while True:
                    await response.write(EVENT)
                    await asyncio.sleep(EVENT_S)
            await asyncio.Event().wait()
        finally:
            # The clock is the same one in all processes.
            self._heard_s.append(time.monotonic())
            self._num_held -= 1
        raise AssertionError("nobody lets it go on")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--role", choices=(PREFILL, DECODE), required=True)
    args = parser.parse_args()
    asyncio.run(MockEngine(args.role).serve(args.port))


if __name__ == "__main__":
    main()
