"""An engine as a process of its own, to be killed, and what its answers should be.

    python -m tests.pd.engine_process --port N [--hold STAGE]

POST /fault with a Fault as the body makes it answer so from then on, while /health says that it is
well; with an empty body it is well again.

Word k of an answer depends on the prompt up to the MARK and on k alone, and k counts the words that
the prompt has behind the MARK: an answer that goes on elsewhere has the same words as one in one
piece. With --hold it stops in that stage of each answer, says so on stdout, and never goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from aiohttp import web
from yarl import URL

from examples.cluster.processes import HttpServer, free_port

MARK = "|"
PATH = "/v1/completions"
START_TIMEOUT_S = 30.0
WORD_S = 0.005
# Of those that are to be held in the middle.
WORDS_BEFORE_HOLD = 3


class Stage(str, Enum):
    BEFORE_HEAD = "before_head"
    BEFORE_FIRST_BYTE = "before_first_byte"
    IN_THE_MIDDLE = "in_the_middle"
    BEFORE_THE_END = "before_the_end"


class Fault(str, Enum):
    """How an engine fails whose health is well."""

    ANSWERS_500 = "500"
    ANSWERS_404 = "404"
    ANSWERS_401 = "401"
    ANSWERS_503 = "503"
    RESETS = "resets"
    HANGS = "hangs"


# No fault: each answer begins so long after it was asked for.
SLOW_S = 1.2
SLOW = "slow"


def said(stage: Stage) -> str:
    """The line on stdout, one for each answer that is held."""
    return f"holding {stage.value}"


def words(prompt: str, count: int) -> list[str]:
    """The next ones of the answer to `prompt`."""
    question, _, answered = prompt.partition(MARK)
    first = len(answered.split())
    name = zlib.crc32(question.encode()) % 1000
    return [f"{name}.{k} " for k in range(first, first + count)]


def text_of(body: bytes) -> str:
    """Of a whole answer, streamed or not."""
    if not body.startswith(b"data:"):
        return str(json.loads(body)["choices"][0]["text"])
    *events, done = body.strip().split(b"\n\n")
    assert b"data: [DONE]" == done, body
    return "".join(map(text_of_event, events))


def text_of_event(event: bytes) -> str:
    return str(json.loads(event.removeprefix(b"data: "))["choices"][0]["text"])


class EngineServer(HttpServer):
    """The process, under a guard."""

    def __init__(self, folder: Path, *, port: int | None = None, hold: Stage | None = None) -> None:
        port = port or free_port()
        command = [sys.executable, "-m", "tests.pd.engine_process", "--port", str(port)]
        if hold is not None:
            command += ["--hold", hold.value]
        super().__init__(command, port=port, log=folder / f"engine-{port}.log")

    @property
    def url(self) -> URL:
        return URL(f"http://127.0.0.1:{self.port}")


@contextmanager
def engines_that_serve(folder: Path, count: int) -> Iterator[list[EngineServer]]:
    """Started together; gone when the block ends."""
    servers = [EngineServer(folder) for _ in range(count)]
    try:
        for server in servers:
            server.wait_ready(START_TIMEOUT_S)
        yield servers
    finally:
        for server in servers:
            server.kill()


class Engine:
    """What runs in it."""

    def __init__(self, hold: Stage | None) -> None:
        self._hold = hold
        self._fault: Fault | None = None
        self._is_slow = False

    async def set_fault(self, request: web.Request) -> web.Response:
        kind = await request.text()
        self._is_slow = kind == SLOW
        self._fault = Fault(kind) if kind and not self._is_slow else None
        return web.Response()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        fields = json.loads(await request.read())
        if self._fault is Fault.RESETS:
            assert request.transport is not None
            request.transport.abort()
        if self._fault in (Fault.RESETS, Fault.HANGS):
            await asyncio.Event().wait()
        if self._fault is not None:
            return web.json_response({"error": self._fault.value}, status=int(self._fault.value))
        if self._is_slow:
            await asyncio.sleep(SLOW_S)
        answer = words(fields["prompt"], fields["max_tokens"])
        await self._reached(Stage.BEFORE_HEAD)
        if fields.get("stream"):
            return await self._stream(request, answer)
        choice = {"index": 0, "text": "".join(answer), "finish_reason": "length"}
        body = json.dumps({"id": "cmpl-1", "choices": [choice]}).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        response = await self._head(request, headers)
        half = len(body) // 2
        await response.write(body[:half])
        await self._reached(Stage.IN_THE_MIDDLE)
        await response.write(body[half:-1])
        await self._reached(Stage.BEFORE_THE_END)
        await response.write(body[-1:])
        return response

    async def _stream(self, request: web.Request, answer: list[str]) -> web.StreamResponse:
        response = await self._head(request, {"Content-Type": "text/event-stream"})
        for k, word in enumerate(answer):
            reason = "length" if k + 1 == len(answer) else None
            choice = {"index": 0, "text": word, "finish_reason": reason}
            event = frame({"id": "cmpl-1", "created": 1, "choices": [choice]})
            if k == WORDS_BEFORE_HOLD:
                # Inside an event: what came of it is of no use to anybody.
                await response.write(event[:20])
                await self._reached(Stage.IN_THE_MIDDLE)
                event = event[20:]
            await response.write(event)
            await asyncio.sleep(WORD_S)
        await self._reached(Stage.BEFORE_THE_END)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _head(self, request: web.Request, headers: dict[str, str]) -> web.StreamResponse:
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await self._reached(Stage.BEFORE_FIRST_BYTE)
        return response

    async def _reached(self, stage: Stage) -> None:
        if stage is self._hold:
            print(said(stage), flush=True)
            await asyncio.Event().wait()


def frame(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


async def _health(_: web.Request) -> web.Response:
    return web.Response()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--hold", type=Stage)
    args = parser.parse_args()
    app = web.Application()
    app.router.add_get("/health", _health)
    engine = Engine(args.hold)
    app.router.add_post(PATH, engine.complete)
    app.router.add_post("/fault", engine.set_fault)
    # Whatever ends it, it is not to wait for what it holds.
    web.run_app(
        app,
        host="127.0.0.1",
        port=args.port,
        shutdown_timeout=0.1,
        handler_cancellation=True,
        print=None,
    )


if __name__ == "__main__":
    main()
