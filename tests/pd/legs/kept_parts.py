"""Engines that keep responses as vLLM does: in their own memory, unknown to all others."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.pd.conftest import Engine, Fleet
from tests.pd.protocol_answers import response, typed

_numbers = itertools.count()


@dataclass
class Kept:
    """What one engine keeps; `engine` answers from it."""

    engine: Engine
    responses: dict[str, dict[str, Any]] = field(default_factory=dict)
    sessions: set[str] = field(default_factory=set)
    # Of a stream's bytes so many at once; all by default.
    piece_bytes: int = 1 << 20
    # What its new answers say was cached; nothing by default.
    answer_usage: int | None = None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/invocations":
            return self._in_session(request, await request.json())
        if request.path == "/v1/responses":
            return await self._made(request, await request.json())
        _, _, _, response_id, *what = request.path.split("/")
        found = self.responses.get(response_id)
        if found is None:
            return missing(response_id)
        if what == ["cancel"]:
            found["status"] = "cancelled"
        elif request.query.get("stream"):
            return await self._streamed(request, found)
        return web.json_response(found)

    async def _made(self, request: web.Request, fields: dict[str, Any]) -> web.StreamResponse:
        before = fields.get("previous_response_id")
        if before is not None and before not in self.responses:
            return missing(before)
        made = response(None if fields.get("background") else "one two")
        made |= {"id": f"resp_{next(_numbers)}", "previous_response_id": before}
        made["metadata"] = {"engine": self.engine.name}
        if self.answer_usage is not None:
            details = {"cached_tokens": self.answer_usage}
            made["usage"] = {"input_tokens": 100, "input_tokens_details": details}
        self.responses[made["id"]] = made
        if fields.get("stream"):
            return await self._streamed(request, made)
        return web.json_response(made)

    async def _streamed(self, request: web.Request, made: dict[str, Any]) -> web.StreamResponse:
        events = typed("response.created", response=made, sequence_number=0)
        events += typed("response.completed", response=made, sequence_number=1)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        for start in range(0, len(events), self.piece_bytes):
            await answer.write(events[start : start + self.piece_bytes])
            await asyncio.sleep(0)
        return answer

    def _in_session(self, request: web.Request, fields: dict[str, Any]) -> web.Response:
        session = request.headers.get("X-Amzn-SageMaker-Session-Id")
        if fields.get("requestType") == "NEW_SESSION":
            session = f"session-{next(_numbers)}"
            self.sessions.add(session)
            name = "X-Amzn-SageMaker-New-Session-Id"
            return web.Response(headers={name: f"{session}; Expires=2030-01-01T00:00:00Z"})
        if session not in self.sessions:
            return web.json_response({"detail": "Bad request: session not found"}, status=400)
        return web.json_response({"from": self.engine.name})


def missing(response_id: str) -> web.Response:
    message = f"Response with id '{response_id}' not found."
    error = {"message": message, "type": "invalid_request_error", "param": "response_id"}
    return web.json_response({"error": {**error, "code": 404}}, status=404)


async def started(fleet: Fleet, num_decode: int, **settings: Any) -> list[Kept]:
    await fleet.start(1, num_decode, policy="round-robin", **settings)
    kept = [Kept(engine) for engine in fleet.decode]
    for each in kept:
        each.engine.answer = each.answer
    return kept


async def made(fleet: Fleet, **fields: Any) -> tuple[str, str]:
    """A response, and the engine that has made it."""
    async with await fleet.post("v1/responses", input="hi", **fields) as answer:
        body = await answer.read()
        assert answer.status == 200, body
    if fields.get("stream"):
        body = json.dumps(json.loads(body.split(b"data: ")[1].split(b"\n")[0])["response"]).encode()
    found = json.loads(body)
    return found["id"], found["metadata"]["engine"]
