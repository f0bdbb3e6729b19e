"""Answers of each protocol that say how much of a prompt of 100 tokens was cached."""

from __future__ import annotations

import copy
import json
from typing import Any

from aiohttp import web

from tests.pd.conftest import Answer
from tests.pd.legs.handoff_parts import RECEIPT, streaming
from tests.pd.protocol_answers import STREAMS, WHOLE, sse, typed

PROMPT_TOKENS = 100
GENERATE = "/inference/v1/generate"
PATHS = [*WHOLE, GENERATE]


def usage(path: str, cached: int | None, *, created: int = 1) -> dict[str, Any]:
    """As vLLM's engines have it with --enable-prompt-tokens-details; None: without it."""
    if path == "/v1/messages":
        if cached is None:
            return {"input_tokens": PROMPT_TOKENS, "output_tokens": 2}
        found = {"cache_read_input_tokens": cached, "cache_creation_input_tokens": created}
        rest = PROMPT_TOKENS - cached - created
        return {"input_tokens": rest, "output_tokens": 2, **found}
    if path == "/v1/responses":
        details: dict[str, Any] = {"cached_tokens": cached or 0, "cache_write_tokens": created}
        details |= {"input_tokens_per_turn": [], "cached_tokens_per_turn": []}
        generated = {"output_tokens": 2, "output_tokens_details": {"reasoning_tokens": 0}}
        total = PROMPT_TOKENS + 2
        given = {"input_tokens": PROMPT_TOKENS, "total_tokens": total, **generated}
        return {**given, "input_tokens_details": details}
    counts: dict[str, Any] = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": 2}
    counts["total_tokens"] = PROMPT_TOKENS + 2
    if cached is not None:
        details = {"cached_tokens": cached, "created_cache_tokens": created}
        counts["prompt_tokens_details"] = {**details, "multimodal_tokens": {"image": 3}}
    return counts


def whole(path: str, cached: int | None, *, created: int = 1, receipt: bool = False) -> bytes:
    body = copy.deepcopy(WHOLE.get(path, {"request_id": "g", "choices": []}))
    body["usage"] = usage(path, cached, created=created)
    text = json.dumps(body)
    if receipt:
        text = text[:-1] + f', "kv_transfer_params": {RECEIPT.decode()}}}'
    return text.encode()


def events(path: str, cached: int | None, *, created: int = 1) -> list[bytes]:
    """With continuous usage in between, as vLLM sends it: without details."""
    said = usage(path, cached, created=created)
    if path == "/v1/responses":
        made = {**WHOLE[path], "usage": said}
        done = typed("response.completed", response=made, sequence_number=3)
        return [*STREAMS[path][:-1], done]
    if path == "/v1/messages":
        stop = {"stop_reason": "end_turn", "stop_sequence": None}
        last = typed("message_delta", delta=stop, usage=said)
        return [*STREAMS[path][:-2], last, STREAMS[path][-1]]
    begun = STREAMS.get(path, [sse({"choices": [{"index": 0, "token_ids": [5]}]}), sse("[DONE]")])
    continuous = {"choices": [], "usage": usage(path, None)}
    final = {"id": "c", "object": "x", "created": 1, "choices": [], "usage": said}
    return [*begun[:-1], sse(continuous), sse(final), begun[-1]]


def decoding(path: str, cached: int | None, *, created: int = 1) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        if (await request.json()).get("stream"):
            return await streaming(*events(path, cached, created=created))(request)
        body = whole(path, cached, created=created)
        return web.Response(body=body, content_type="application/json")

    return answer
