"""Answers of which benchmarks read more than the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from examples.cluster.client import Answer, Client, RequestFailed


def stream(client: Client, prompt: Sequence[int], *, max_tokens: int, **extra: Any) -> Answer:
    """Client.complete, of which all tokens must come."""
    answer = client.complete(prompt, max_tokens=max_tokens, **extra)
    if len(answer.token_ids) != max_tokens:
        raise RequestFailed(200, f"{len(answer.token_ids)} of {max_tokens} tokens came")
    return answer


def stages_s(answer: Answer) -> dict[str, float]:
    """What the proxy's Server-Timing says."""
    parts = [part for part in answer.headers.get("server-timing", "").split(", ") if part]
    named = (part.partition(";dur=") for part in parts)
    return {name: float(milliseconds) / 1000 for name, _, milliseconds in named}
