"""What an engine answers in each protocol: whole bodies, and the events of a stream."""

from __future__ import annotations

import json
from typing import Any


def sse(event: dict[str, Any] | str, *, name: str | None = None) -> bytes:
    data = event if isinstance(event, str) else json.dumps(event)
    return (f"event: {name}\n" if name else "").encode() + f"data: {data}\n\n".encode()


def typed(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, name=kind)


def completion(text: str, reason: str | None) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
    return {
        "id": "c",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
    }


def chat(text: str, reason: str | None, *, part: str) -> dict[str, Any]:
    said = {"role": "assistant", "content": text}
    choice = {"index": 0, part: said, "finish_reason": reason}
    kind = "chat.completion" + (".chunk" if part == "delta" else "")
    return {"id": "c", "object": kind, "created": 1, "model": "m", "choices": [choice]}


def message(text: str | None) -> dict[str, Any]:
    content = [] if text is None else [{"type": "text", "text": text}]
    return {
        "id": "m1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": content,
        "stop_reason": None if text is None else "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }


def response(text: str | None) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    said = {
        "id": "i",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [part],
    }
    return {
        "id": "r1",
        "object": "response",
        "created_at": 1,
        "model": "m",
        "status": "in_progress" if text is None else "completed",
        "output": [] if text is None else [said],
        "parallel_tool_calls": False,
        "tool_choice": "auto",
        "tools": [],
    }


def delta(text: str, number: int) -> bytes:
    where = {"item_id": "i", "output_index": 0, "content_index": 0, "logprobs": []}
    return typed("response.output_text.delta", delta=text, sequence_number=number, **where)


# What an engine answers: the whole body, and the events of a stream.
WHOLE: dict[str, dict[str, Any]] = {
    "/v1/completions": completion("one two", "stop"),
    "/v1/chat/completions": chat("one two", "stop", part="message"),
    "/v1/responses": response("one two"),
    "/v1/messages": message("one two"),
}
_DONE = sse("[DONE]")
STREAMS: dict[str, list[bytes]] = {
    "/v1/completions": [sse(completion("one ", None)), sse(completion("two", "stop")), _DONE],
    "/v1/chat/completions": [
        sse(chat("one ", None, part="delta")),
        sse(chat("two", "stop", part="delta")),
        _DONE,
    ],
    "/v1/responses": [
        typed("response.created", response=response(None), sequence_number=0),
        delta("one ", 1),
        delta("two", 2),
        typed("response.completed", response=response("one two"), sequence_number=3),
    ],
    "/v1/messages": [
        typed("message_start", message=message(None)),
        typed("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        typed("content_block_delta", index=0, delta={"type": "text_delta", "text": "one "}),
        typed("content_block_delta", index=0, delta={"type": "text_delta", "text": "two"}),
        typed("content_block_stop", index=0),
        typed(
            "message_delta",
            delta={"stop_reason": "end_turn", "stop_sequence": None},
            usage={"output_tokens": 2},
        ),
        typed("message_stop"),
    ],
}
