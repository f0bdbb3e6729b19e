"""What one client gets: an answer as it is, or a stream, perhaps of several instances in turn."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

import aiohttp
from aiohttp import web

from ucm.pd.errors import error_response
from ucm.pd.legs import bodies, upstream
from ucm.pd.legs.receipts import may_have_receipt, without_receipt
from ucm.pd.legs.resume import Events, Tracker
from ucm.pd.legs.said import Said
from ucm.pd.legs.usage import PrefillUsage
from ucm.pd.protocol import Protocol, protocol_of
from ucm.pd.trace import RequestTrace

logger = logging.getLogger(__name__)

_EVENT_STREAM = "text/event-stream"
_NO_PROTOCOL = Protocol()
_FAILURES = {404: "gone", 502: "unreachable", 503: "turned_away", 504: "timeout"}


@dataclass(frozen=True)
class Answer:
    """An engine's, from its first bytes on. `first` is the whole body, or the first piece of a
    stream that has more."""

    upstream: aiohttp.ClientResponse
    first: bytes
    is_whole: bool
    # To be called for each piece that comes from the engine.
    heard: Callable[[], None]
    # None where the connection has one already.
    idle_timeout_s: float | None = None
    # Sees each piece before the client does.
    looks: Callable[[bytes], None] | None = None

    def close(self) -> None:
        self.upstream.close()

    @property
    def is_event_stream(self) -> bool:
        """One whose events can be read: a compressed one is passed on as it comes."""
        return self.upstream.content_type == _EVENT_STREAM and self.is_plain

    @property
    def is_plain(self) -> bool:
        """Not compressed."""
        return self.upstream.headers.get("Content-Encoding", "identity").lower() == "identity"

    async def pieces(self) -> AsyncIterator[bytes]:
        piece = self.first
        while True:
            if self.looks is not None:
                self.looks(piece)
            yield piece
            reading = self.upstream.content.readany()
            piece = await asyncio.wait_for(reading, self.idle_timeout_s)
            if not piece:
                return
            self.heard()


@dataclass(frozen=True)
class Problem:
    """Why an instance's answer is none for the client. `code` is the client's status if it stays
    the last one; nobody else is asked if it `is_final`."""

    text: str
    code: int
    is_final: bool = False


class Delivery:
    """`tracker` is for requests whose stream may be resumed, `usage` for those that were prefilled.
    Owned by the request's task."""

    def __init__(
        self,
        request: web.Request,
        trace: RequestTrace,
        tracker: Tracker | None,
        usage: PrefillUsage | None = None,
    ) -> None:
        self.response: web.StreamResponse | None = None
        self.request = request
        self._trace = trace
        self._tracker = tracker
        self._usage = usage
        self._said = Said()
        self._is_event_stream = False
        # Whose events these are; one that knows none where they can't be read.
        self._protocol = _NO_PROTOCOL
        self._has_ended = False

    @property
    def can_resume(self) -> bool:
        return self._tracker is not None and self._tracker.can_resume and self._is_event_stream

    def body(self, first: bytes | None) -> bytes | None:
        """What to ask an instance: the client's own bytes, or for the rest of the answer."""
        if self.response is None:
            return first
        assert self._tracker is not None
        return self._tracker.body()

    async def take(self, answer: Answer) -> str | None:
        """Sends it on. Returns what is wrong if it was broken off, None when the client has all.
        `response` is the client's from now on."""
        if self.response is not None:
            return await self._go_on(answer)
        headers = upstream.response_headers(answer.upstream.headers)
        headers.update(self._trace.headers())
        status, reason = answer.upstream.status, answer.upstream.reason
        self._trace.status = status
        if answer.is_whole:
            body = await self._whole(answer)
            if body is not answer.first:
                headers.popall("Content-Length", None)
            self.response = web.Response(status=status, reason=reason, headers=headers, body=body)
            return None
        self.response = web.StreamResponse(status=status, reason=reason, headers=headers)
        self._is_event_stream = answer.is_event_stream
        if self._is_event_stream:
            self._protocol = protocol_of(self.request.path)
        try:
            await self.response.prepare(self.request)
        except ConnectionError:
            self._trace.client_left()
            return None
        return await self._pump(answer, is_first=True)

    async def _whole(self, answer: Answer) -> bytes:
        body = answer.first
        is_ok = answer.upstream.status == web.HTTPOk.status_code
        if not is_ok or not answer.is_plain:
            return body
        if may_have_receipt(body):
            body, stored = await bodies.apart(partial(without_receipt, body), num_bytes=len(body))
            self._trace.stored_tokens = stored
        if self._trace.reads_answer:
            await bodies.apart(partial(self._said.read_whole, body), num_bytes=len(body))
            self._trace.answer_tokens, self._trace.answer_ids = self._said.tokens, self._said.ids
        return body if self._usage is None else await self._usage.in_body(body)

    async def _go_on(self, answer: Answer) -> str | None:
        if answer.upstream.status != web.HTTPOk.status_code or not answer.is_event_stream:
            return f"{answer.upstream.url.origin()} answered {answer.upstream.status}"
        self._trace.path = "resumed"
        return await self._pump(answer, is_first=False)

    async def _pump(self, answer: Answer, *, is_first: bool) -> str | None:
        """Where events are known only whole ones go on: what was cut off inside one is of no use
        to anybody, and an error event behind it could not be read."""
        assert self.response is not None
        where = answer.upstream.url.origin()
        events = Events()
        tracker = self._tracker if self._is_event_stream else None
        is_known = self._protocol.last_event is not None
        try:
            async for piece in answer.pieces():
                if not is_known:
                    await self.response.write(piece)
                elif whole := events.feed(piece):
                    # In this order: what the client may have got is never asked for again.
                    if tracker is not None:
                        tracker.add(whole)
                        whole = whole if is_first else tracker.continued(whole)
                    if self._trace.reads_answer:
                        self._said.read_events(whole)
                        self._trace.answer_tokens = self._said.tokens
                    if self._usage is not None:
                        whole = await self._usage.in_events(whole)
                    await self.response.write(whole)
                    self._note_end(whole)
        except upstream.UNREACHABLE as error:
            if self.request.transport is None or self.request.transport.is_closing():
                self._trace.client_left()
                return None
            if await self._is_whole(tracker):
                return None  # all that was missing is the end of the connection
            return f"{where} broke off its answer: {error!r}"
        return await self._ended(answer, events.rest(), tracker)

    async def _ended(self, answer: Answer, rest: bytes, tracker: Tracker | None) -> str | None:
        """The engine says that this was all: where events are known, the last one has to be there.
        Many servers leave out the empty line behind it."""
        assert self.response is not None
        is_known = self._protocol.last_event is not None
        if not is_known or answer.upstream.status != web.HTTPOk.status_code:
            await self._write_rest(rest)
            await self.response.write_eof()
            return None
        if self._protocol.is_last(rest):
            self._note_end(rest)
            await self._write_rest(rest)
        if await self._is_whole(tracker):
            return None
        return (
            f"{answer.upstream.url.origin()} broke off its answer: it ended without its last event"
        )

    async def _is_whole(self, tracker: Tracker | None) -> bool:
        """Whether the client has all; then the answer is ended."""
        assert self.response is not None
        if not self._has_ended and tracker is not None and tracker.lacks_only_the_end:
            tracker.is_done = self._has_ended = True
            await self.response.write(b"data: [DONE]\n\n")
        if self._has_ended:
            await self.response.write_eof()
        return self._has_ended

    def _note_end(self, events: bytes) -> None:
        """Many clients go as soon as they have read the last event."""
        if self._protocol.is_last(events):
            self._trace.is_delivered = self._has_ended = True

    async def _write_rest(self, rest: bytes) -> None:
        if rest and self.response is not None:
            await self.response.write(rest)

    async def break_off(self, problem: str, *, code: int = 502) -> None:
        """The status is long out: an error event says that the answer is not whole; where the
        client knows none, the connection ends inside the body."""
        assert self.response is not None
        logger.warning("%s", problem)
        self._trace.failed("broken_off")
        event = self._protocol.error_event(code, problem)
        if event is not None:
            await self.response.write(event)
            await self.response.write_eof()
        elif self.request.transport is not None:
            self.request.transport.close()


async def give_up(delivery: Delivery, trace: RequestTrace, problem: Problem) -> web.StreamResponse:
    """The client hears the problem: in place of an answer, or behind what it has of one."""
    if delivery.response is not None:
        await delivery.break_off(problem.text)
        return delivery.response
    trace.status = problem.code
    trace.failed(_FAILURES[problem.code])
    response = error_response(problem.code, problem.text, path=delivery.request.path)
    response.headers.update(trace.headers())
    return response
