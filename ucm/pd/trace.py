"""One request's way through the proxy: its id, its path, the time of each stage.

It ends up in the response's headers, in the metrics and in one line of the log.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from ucm.pd.fleet.affinity import Prefix
from ucm.pd.legs.upstream import REQUEST_ID
from ucm.pd.metrics import ProxyMetrics

logger = logging.getLogger(__name__)

PATH = "x-ucm-pd-path"
REASON = "x-ucm-pd-reason"
_MAX_ID_CHARS = 128


class RequestTrace:
    """Made when a request comes, ended (`end`) when its response is out or its client gone."""

    def __init__(self, metrics: ProxyMetrics, *, route: str, request_id: str | None) -> None:
        given = request_id or ""
        is_usable = 0 < len(given) <= _MAX_ID_CHARS and given.isprintable()
        self.request_id = given if is_usable else uuid.uuid4().hex
        self.path = "decode-only"
        self.reason: str | None = None
        self.status = 0
        self.tokens = 0
        # What requests that need the same of an instance have in common; empty for no claim.
        self.kind = ""
        # Where its prompt lies, if anybody wants to know.
        self.prefix: Prefix | None = None
        self.is_streamed = False
        # Of the prompt with its answer, by what decode has said.
        self.stored_tokens = 0
        # How much the answer says, a guess, and its ids; read where anybody wants to know.
        self.reads_answer = False
        self.answer_tokens = 0
        self.answer_ids: Sequence[int] = ()
        # The client has all it has asked for; whether it stays for the end is its own business.
        self.is_delivered = False
        # The proxy stops, and has ended this request for it.
        self.is_interrupted = False
        self._metrics = metrics
        self._route = route
        self._started_s = time.monotonic()
        self._stages: dict[str, float] = {}
        self._failure: str | None = None
        metrics.open_requests.inc()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Stages of one name add up."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.spent(name, time.monotonic() - started_s)

    def spent(self, stage: str, spent_s: float) -> None:
        self._stages[stage] = self._stages.get(stage, 0.0) + spent_s

    def not_prefilled(self, reason: str) -> None:
        self.reason = reason
        if reason == "known":
            self.path = "skip-known"
        else:
            self.path = "skip-short" if reason == "short" else "decode-only"
        self._metrics.not_prefilled.labels(reason).inc()

    def withdrawn(self) -> None:
        self._metrics.withdrawn.inc()

    def retried(self, role: str) -> None:
        self._metrics.retries.labels(role).inc()

    def client_left(self) -> None:
        """Nobody is left to tell what is wrong, if anything is."""
        if not self.is_delivered:
            self._failure = "client_left"

    def failed(self, reason: str) -> None:
        self._failure = reason

    def headers(self) -> dict[str, str]:
        """For the response; called when its first byte is there."""
        timing = ", ".join(
            f"{name.replace('_', '-')};dur={spent_s * 1000:.1f}"
            for name, spent_s in self._stages.items()
        )
        headers = {REQUEST_ID: self.request_id, PATH: self.path}
        headers |= {"Server-Timing": timing} if timing else {}
        return headers | ({REASON: self.reason} if self.reason else {})

    def end(self) -> None:
        total_s = time.monotonic() - self._started_s
        self._metrics.open_requests.dec()
        self._metrics.requests.labels(self.path).inc()
        for name, spent_s in (*self._stages.items(), ("total", total_s)):
            self._metrics.stage_s.labels(name).observe(spent_s)
        if self._failure is not None:
            self._metrics.failed.labels(self._failure).inc()
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s", self._line(total_s).decode())

    def _line(self, total_s: float) -> bytes:
        stages = {f"{name}_ms": round(s * 1000, 1) for name, s in self._stages.items()}
        line = {
            "request": self.request_id,
            "route": self._route,
            "path": self.path,
            "reason": self.reason,
            "status": self.status,
            "stored_tokens": self.stored_tokens,
            "failure": self._failure,
            **stages,
            "total_ms": round(total_s * 1000, 1),
        }
        return msgspec.json.encode({name: value for name, value in line.items() if value})
