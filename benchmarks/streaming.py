"""A request whose answer is streamed, with the time of each event; for what the demo's client does
not keep."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.cluster.client import Client, RequestFailed

_HEADERS = {"Content-Type": "application/json"}


@dataclass
class Stream:
    """`arrived_s` has the time of each event with tokens; times are monotonic. `headers` have
    names in lower case."""

    sent_s: float
    headers: Mapping[str, str] = field(default_factory=dict)
    arrived_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.arrived_s[0] - self.sent_s

    @property
    def stages_s(self) -> dict[str, float]:
        """What the proxy's Server-Timing says."""
        parts = [part for part in self.headers.get("server-timing", "").split(", ") if part]
        named = (part.partition(";dur=") for part in parts)
        return {name: float(milliseconds) / 1000 for name, _, milliseconds in named}


def stream(
    client: Client,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    on_first: Callable[[], None] = lambda: None,
    **extra: Any,
) -> Stream:
    """POST /v1/completions, greedy, exactly `max_tokens` tokens. `on_first` is called at the first
    of them."""
    body = {
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        **extra,
    }
    payload = json.dumps(body)
    connection = http.client.HTTPConnection(client.host, client.port, timeout=client.timeout_s)
    answer = Stream(time.monotonic())
    try:
        connection.request("POST", "/v1/completions", payload, _HEADERS)
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise RequestFailed(response.status, response.read().decode(errors="replace"))
        answer.headers = {name.lower(): value for name, value in response.getheaders()}
        for line in response:
            _take(line, time.monotonic(), answer, on_first)
    finally:
        connection.close()
    if len(answer.token_ids) != max_tokens:
        raise RequestFailed(200, f"{len(answer.token_ids)} of {max_tokens} tokens came")
    return answer


def _take(line: bytes, now_s: float, answer: Stream, on_first: Callable[[], None]) -> None:
    if not line.startswith(b"data: {"):
        return
    event = json.loads(line[len(b"data: ") :])
    if "error" in event:
        raise RequestFailed(200, json.dumps(event["error"]))
    ids = [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
    if not ids:
        return
    if not answer.arrived_s:
        on_first()
    answer.arrived_s.append(now_s)
    answer.token_ids.extend(ids)
