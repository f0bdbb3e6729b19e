"""Asking one instance: the client's request to it, the beginning of its answer back, and what that
says about the instance.

An answer that has a length is read whole before anybody sees any of it, of a stream, and of an
answer that is too long to be held, the first piece.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import aiohttp
from aiohttp import web

from ucm.pd.errors import RETRY_AFTER_S
from ucm.pd.fleet.instance import Instance, Role
from ucm.pd.fleet.silence import InstanceSilent, Scout, unless_lost
from ucm.pd.legs import upstream, verdict
from ucm.pd.legs.delivery import Answer
from ucm.pd.legs.verdict import Verdict
from ucm.pd.trace import RequestTrace

logger = logging.getLogger(__name__)


class Asker:
    """Of the instances of one role. Owned by the event loop's thread."""

    def __init__(
        self,
        client: upstream.Client,
        role: Role,
        *,
        idle_timeout_s: float,
        answer_timeout_s: float | None,
        max_answer_bytes: int,
    ) -> None:
        self._client = client
        self._role = role
        self._idle_timeout_s = idle_timeout_s
        self._answer_timeout_s = answer_timeout_s
        self._max_answer_bytes = max_answer_bytes

    async def ask(
        self,
        instance: Instance,
        request: web.Request,
        body: bytes | None,
        trace: RequestTrace,
        *,
        suffix: str = "",
        scout: Scout | None = None,
    ) -> Answer:
        """The beginning of its answer. `suffix` goes behind the request's id; with a `scout` it is
        one that an engine has to compute. Raises UNREACHABLE."""
        request_id = trace.request_id + suffix
        headers = self._client.headers(request.headers, instance.role, request_id=request_id)
        url = upstream.target(instance.url, request.raw_path)

        def heard() -> None:
            instance.heard()
            if scout is not None:
                instance.worked()

        async def begin(idle_timeout_s: float | None) -> Answer:
            response = await upstream.ask(
                self._client,
                request.method,
                url,
                body=body,
                headers=headers,
                idle_timeout_s=idle_timeout_s,
            )
            return await _begin(response, heard, self._max_answer_bytes)

        if trace.is_streamed:
            asking = begin(self._idle_timeout_s)
        else:
            asking = self._answer_in_time(begin(None))
        with trace.stage("decode_ttft"):
            answer = await unless_lost(instance, asking, scout)
        instance.heard()
        return answer

    async def _answer_in_time(self, beginning: Coroutine[Any, Any, Answer]) -> Answer:
        """Nothing comes of an answer that is not streamed before all of it does. If it turns out to
        be a stream, it has a stream's limits from then on."""
        answer = await asyncio.wait_for(beginning, self._answer_timeout_s)
        return replace(answer, idle_timeout_s=self._idle_timeout_s)

    def unanswered(
        self, instance: Instance, error: BaseException, trace: RequestTrace
    ) -> tuple[str, str]:
        """The reason, and a text for the client; what it says about the instance is noted."""
        role = self._role.value
        reason = upstream.failure_reason(error)
        what = str(error)
        if isinstance(error, InstanceSilent):
            pass  # it says it
        elif reason == "timeout" and trace.is_streamed:
            what = f"nothing came for --idle-timeout-s, {self._idle_timeout_s:g} s"
        elif reason == "timeout":
            what = f"no whole answer within --answer-timeout-s, {self._answer_timeout_s:g} s"
        logger.warning("%s %s: %s (%s)", role, instance.url, reason, what)
        if reason == upstream.OUT_OF_SOCKETS:
            return reason, f"the proxy has no file descriptor or port left: {what}"
        if reason in ("unreadable", "timeout"):
            # About this answer: too long a header, perhaps. Whether a silent one is well its health
            # checks say.
            instance.shun(instance.breaker.open_s)
        else:
            instance.failed()
        return reason, f"the {role} instance at {instance.url}: {reason} ({what})"


def judged(instance: Instance, answer: Answer, *, method: str) -> Verdict:
    """What the answer says about the instance; noted there."""
    what = verdict.of_status(answer.upstream.status, method=method)
    note(instance, what)
    return what


def note(instance: Instance, what: Verdict) -> None:
    """Of either leg."""
    if what is Verdict.GOOD:
        instance.succeeded()
    elif what is Verdict.FAILED:
        instance.failed()
    elif what is Verdict.BUSY:
        instance.shun(RETRY_AFTER_S)


async def _begin(
    response: aiohttp.ClientResponse, heard: Callable[[], None], max_bytes: int
) -> Answer:
    try:
        if response.content_length is not None and response.content_length <= max_bytes:
            return Answer(response, await response.read(), is_whole=True, heard=heard)
        return Answer(response, await response.content.readany(), is_whole=False, heard=heard)
    except BaseException:
        response.close()
        raise
