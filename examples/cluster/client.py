"""A small synchronous client of the OpenAI API as vLLM speaks it, with token ids in and out."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """What came back for one prompt."""

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str | None
    ttft_s: float
    total_s: float


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Where a server's prompt tokens came from, since its start. The difference of two is a
    Counters too."""

    computed: int
    local_hits: int
    external_hits: int
    external_queries: int

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(
            computed=self.computed - earlier.computed,
            local_hits=self.local_hits - earlier.local_hits,
            external_hits=self.external_hits - earlier.external_hits,
            external_queries=self.external_queries - earlier.external_queries,
        )


@dataclass
class _Gathered:
    """An answer while its stream is being read."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: str | None = None
    first_token_at: float | None = None

    def add(self, chunk: Mapping[str, Any]) -> None:
        if "error" in chunk:
            raise RequestFailed(200, json.dumps(chunk["error"]))
        for choice in chunk.get("choices", ()):
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or ""
            token_ids = choice.get("token_ids") or ()
            if (text or token_ids) and self.first_token_at is None:
                self.first_token_at = time.monotonic()
            self.text.append(text)
            self.token_ids.extend(token_ids)
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        usage = chunk.get("usage") or {}
        self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)


class Client:
    """One server, asked over a new connection each time; safe to share between threads."""

    def __init__(self, host: str, port: int, *, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        self.host = host
        self.port = port
        self.timeout_s = timeout_s

    def complete(self, prompt: Prompt, *, max_tokens: int = 16, **extra: Any) -> Answer:
        """POST /v1/completions, streamed, greedy, exactly `max_tokens` tokens unless told."""
        ids = prompt if isinstance(prompt, str) else list(prompt)
        return self._ask("/v1/completions", {"prompt": ids, **_fields(max_tokens), **extra})

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
        samples = self.metrics()

        def total(name: str, label: str = "") -> int:
            return int(sum(v for k, v in samples.items() if k.startswith(name) and label in k))

        by_source = "vllm:prompt_tokens_by_source_total{"
        return Counters(
            computed=total(by_source, 'source="local_compute"'),
            local_hits=total(by_source, 'source="local_cache_hit"'),
            external_hits=total("vllm:external_prefix_cache_hits_total{"),
            external_queries=total("vllm:external_prefix_cache_queries_total{"),
        )

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

    def _ask(self, path: str, body: Mapping[str, Any]) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        started_at = time.monotonic()
        gathered = _Gathered()
        try:
            connection.request("POST", path, json.dumps(body), _HEADERS)
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise RequestFailed(response.status, response.read().decode(errors="replace"))
            for chunk in _events(response):
                gathered.add(chunk)
        finally:
            connection.close()
        ended_at = time.monotonic()
        first_token_at = ended_at if gathered.first_token_at is None else gathered.first_token_at
        return Answer(
            text="".join(gathered.text),
            token_ids=tuple(gathered.token_ids),
            prompt_tokens=gathered.prompt_tokens,
            finish_reason=gathered.finish_reason,
            ttft_s=first_token_at - started_at,
            total_s=ended_at - started_at,
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
