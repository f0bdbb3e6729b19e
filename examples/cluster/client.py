"""A small synchronous client of the OpenAI API as vLLM speaks it, with token ids in and out."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

REQUEST_TIMEOUT_S = 300.0

Prompt = str | Sequence[int]


class RequestFailed(Exception):
    """The server answered with an error status, an error inside a stream, or a stream that
    stopped before its end."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status}: {body[:2000]}")
        self.status = status
        self.body = body


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back for one prompt. `sent_s`, `ended_s` and `arrived_s`, which has the time of
    each event with tokens, are monotonic. `headers` have names in lower case."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str | None
    headers: Mapping[str, str]
    sent_s: float
    arrived_s: tuple[float, ...]
    ended_s: float

    @property
    def ttft_s(self) -> float:
        return (self.arrived_s[0] if self.arrived_s else self.ended_s) - self.sent_s

    @property
    def total_s(self) -> float:
        return self.ended_s - self.sent_s


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Where a server's prompt tokens came from, since its start. The difference of two is a
    Counters too."""

    computed: int
    local_hits: int
    external_hits: int
    external_queries: int

    @classmethod
    def of(cls, samples: Mapping[str, float]) -> Counters:
        """Of what Client.metrics has found."""
        by_source = by_label(samples, "vllm:prompt_tokens_by_source_total", "source")
        return cls(
            computed=by_source["local_compute"],
            local_hits=by_source["local_cache_hit"],
            external_hits=int(total(samples, "vllm:external_prefix_cache_hits_total")),
            external_queries=int(total(samples, "vllm:external_prefix_cache_queries_total")),
        )

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(
            computed=self.computed - earlier.computed,
            local_hits=self.local_hits - earlier.local_hits,
            external_hits=self.external_hits - earlier.external_hits,
            external_queries=self.external_queries - earlier.external_queries,
        )


def total(samples: Mapping[str, float], name: str) -> float:
    """The sum of a metric over its labels, of what Client.metrics has found."""
    return sum(value for key, value in samples.items() if key.startswith(f"{name}{{"))


def by_label(samples: Mapping[str, float], name: str, label: str) -> Counter[str]:
    """The sums of a metric for each value of one label."""
    found: Counter[str] = Counter()
    for key, value in samples.items():
        named = re.search(f'{label}="([^"]*)"', key)
        if key.startswith(f"{name}{{") and named:
            found[named[1]] += int(value)
    return found


@dataclass
class _Gathered:
    """An answer while its stream is being read."""

    on_first: Callable[[], None]
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: str | None = None
    arrived_s: list[float] = field(default_factory=list)

    def add(self, chunk: Mapping[str, Any], now_s: float) -> None:
        if "error" in chunk:
            raise RequestFailed(200, json.dumps(chunk["error"]))
        has_tokens = False
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or ""
            token_ids = choice.get("token_ids") or ()
            has_tokens |= bool(text or token_ids)
            self.text.append(text)
            self.token_ids.extend(token_ids)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        usage = chunk.get("usage") or {}
        self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
        if has_tokens:
            if not self.arrived_s:
                self.on_first()
            self.arrived_s.append(now_s)


class Client:
    """One server, asked over a new connection each time; safe to share between threads."""

    def __init__(self, host: str, port: int, *, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        self.host = host
        self.port = port
        self.timeout_s = timeout_s

    def complete(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 16,
        on_first: Callable[[], None] = lambda: None,
        **extra: Any,
    ) -> Answer:
        """POST /v1/completions, streamed, greedy, exactly `max_tokens` tokens unless told.
        `on_first` is called at the first of them."""
        ids = prompt if isinstance(prompt, str) else list(prompt)
        body = {"prompt": ids, **_fields(max_tokens), **extra}
        return self._ask("/v1/completions", body, on_first)

    def chat(self, content: str, *, max_tokens: int = 16, **extra: Any) -> Answer:
        """POST /v1/chat/completions with one user message."""
        messages = [{"role": "user", "content": content}]
        body = {"messages": messages, **_fields(max_tokens), **extra}
        return self._ask("/v1/chat/completions", body)

    def prefill(
        self, prompt: Sequence[int], *, params: Mapping[str, Any], **extra: Any
    ) -> Mapping[str, Any]:
        """Has the prompt computed, as a proxy would; returns the `kv_transfer_params` for decode.
        Not streamed: vLLM doesn't send them in streams."""
        body = {"prompt": list(prompt), "max_tokens": 1, "temperature": 0, **extra}
        status, answer = self.post("/v1/completions", {**body, "kv_transfer_params": params})
        if status != http.HTTPStatus.OK:
            raise RequestFailed(status, answer)
        return json.loads(answer).get("kv_transfer_params") or {}

    def counters(self) -> Counters:
        return Counters.of(self.metrics())

    def metrics(self) -> dict[str, float]:
        """Every sample of GET /metrics by its full name, labels included."""
        status, body = self.get("/metrics")
        if status != http.HTTPStatus.OK:
            raise RequestFailed(status, body)
        lines = (line for line in body.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        """One request without a stream: status and body, whatever the status."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        try:
            connection.request("POST", path, json.dumps(body), _HEADERS)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def _ask(
        self, path: str, body: Mapping[str, Any], on_first: Callable[[], None] = lambda: None
    ) -> Answer:
        payload = json.dumps(body)
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        gathered = _Gathered(on_first)
        sent_s = time.monotonic()
        try:
            connection.request("POST", path, payload, _HEADERS)
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise RequestFailed(response.status, response.read().decode(errors="replace"))
            for chunk in _events(response):
                gathered.add(chunk, time.monotonic())
        finally:
            connection.close()
        return Answer(
            text="".join(gathered.text),
            token_ids=tuple(gathered.token_ids),
            prompt_tokens=gathered.prompt_tokens,
            finish_reason=gathered.finish_reason,
            headers={name.lower(): value for name, value in response.getheaders()},
            sent_s=sent_s,
            arrived_s=tuple(gathered.arrived_s),
            ended_s=time.monotonic(),
        )


_HEADERS = {"Content-Type": "application/json"}


def _fields(max_tokens: int) -> dict[str, Any]:
    return {
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.strip() == b"data: [DONE]":
            return
        if line.startswith(b"data:"):
            yield json.loads(line[len(b"data:") :])
    raise RequestFailed(200, "the stream stopped before data: [DONE]")
