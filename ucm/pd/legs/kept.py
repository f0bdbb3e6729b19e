"""Requests about what one instance keeps: to that one if it is remembered, or to each in turn.

An instance that knows nothing of it says 404, and has done nothing. So the next one is asked, up to
a bound. What lived in a process is gone with it: where nobody listens any more, or the instance is
no member, the client gets a 404 that says so. While somebody who may have it can't answer, that is
the answer: it is not known to be gone.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from aiohttp import web
from yarl import URL

from ucm.pd.fleet.instance import Instance
from ucm.pd.fleet.pool import Pool, QueueFull
from ucm.pd.legs import upstream
from ucm.pd.legs.asking import Asker, judged
from ucm.pd.legs.delivery import Answer, Delivery, Problem, give_up
from ucm.pd.legs.keepers import Keepers, Name
from ucm.pd.legs.verdict import Verdict
from ucm.pd.trace import RequestTrace

_SHOWN_BYTES = 500


@dataclass(eq=False)
class _Search:
    """What has been heard so far. `denied` is the first answer of one that doesn't have it,
    `unclear` of one that could not say; `deserted` are those where nobody listens."""

    denied: Answer | None = None
    unclear: Answer | Problem | None = None
    deserted: list[Instance] = field(default_factory=list)

    def keep_denial(self, answer: Answer) -> None:
        if self.denied is None:
            self.denied = answer
        else:
            answer.close()

    def keep_unclear(self, found: Answer | Problem) -> None:
        if self.unclear is None:
            self.unclear = found
        elif isinstance(found, Answer):
            found.close()

    def close(self) -> None:
        for each in (self.denied, self.unclear):
            if isinstance(each, Answer):
                each.close()


class KeptRelay:
    """Owned by the event loop's thread."""

    def __init__(self, asker: Asker, pool: Pool, keepers: Keepers, *, max_searched: int) -> None:
        self._asker = asker
        self._pool = pool
        self._keepers = keepers
        self._max_searched = max_searched

    async def answer(
        self, delivery: Delivery, body: bytes | None, trace: RequestTrace, name: Name
    ) -> web.StreamResponse:
        """The client's response, sent. Never raises but for a client that has left."""
        keeper = self._keepers.find(name)
        there = self._members() if keeper is None else self._members_at(keeper)
        search = _Search()
        try:
            for i, instance in enumerate(there[: self._max_searched]):
                if i > 0:
                    trace.retried(self._pool.role.value)
                if await self._is_answered_by(instance, delivery, body, trace, name, search):
                    assert delivery.response is not None
                    return delivery.response
            found = search.unclear or self._absent(search, name, keeper, len(there))
            if isinstance(found, Problem):
                return await give_up(delivery, trace, found)
            await delivery.take(found)
            assert delivery.response is not None
            return delivery.response
        finally:
            search.close()

    def _members(self) -> list[Instance]:
        """Who is well first. One that drains still has what it keeps."""
        return sorted(self._pool.instances, key=lambda each: (not each.is_well, each.running))

    def _members_at(self, url: URL) -> list[Instance]:
        return [each for each in self._pool.instances if each.url == url]

    async def _is_answered_by(
        self,
        instance: Instance,
        delivery: Delivery,
        body: bytes | None,
        trace: RequestTrace,
        name: Name,
        search: _Search,
    ) -> bool:
        """Whether the client has its answer; `search` knows why not."""
        try:
            with trace.stage("queue"):
                await self._pool.admit_to(instance, tokens=trace.tokens)
        except QueueFull as error:
            search.keep_unclear(Problem(str(error), code=503))
            return False
        try:
            answer = await self._asked(instance, delivery, body, trace, search)
            if answer is None:
                return False
            if answer.upstream.status < 400 and self._keepers.find(name) is None:
                self._keepers.note(name, instance.url)
            path = delivery.request.path
            answer = self._keepers.noting(answer, path=path, url=instance.url)
            async with answer.upstream:
                broken = await delivery.take(answer)
            if broken is not None:
                await delivery.break_off(broken)
            return True
        finally:
            self._pool.leave(instance, tokens=trace.tokens)

    async def _asked(
        self,
        instance: Instance,
        delivery: Delivery,
        body: bytes | None,
        trace: RequestTrace,
        search: _Search,
    ) -> Answer | None:
        """The answer if it is one for the client at once."""
        request = delivery.request
        try:
            answer = await self._asker.ask(instance, request, body, trace)
        except upstream.UNREACHABLE as error:
            reason, text = self._asker.unanswered(instance, error, trace)
            if _is_deserted(error):
                search.deserted.append(instance)
            else:
                search.keep_unclear(Problem(text, code=upstream.status_for(reason)))
            return None
        what = judged(instance, answer, method=request.method)
        if what.is_settled:
            return answer
        if what is Verdict.DOUBTED:
            search.keep_denial(answer)
        else:
            search.keep_unclear(answer)
        return None

    def _absent(
        self, search: _Search, name: Name, keeper: URL | None, num_there: int
    ) -> Answer | Problem:
        """What the client hears when all that were asked are sure, or gone."""
        role = self._pool.role.value
        if keeper is not None:
            if search.denied is not None:
                return search.denied
            why = "where nobody listens now" if search.deserted else f"no {role} instance any more"
            return Problem(f"{name} was kept by {keeper}, {why}: it is gone with it", code=404)
        if num_there == 0:
            return Problem(f"there is no {role} instance to ask", code=503)
        if search.denied is not None and not search.deserted and num_there <= self._max_searched:
            return search.denied
        silent = ", ".join(str(each.url) for each in search.deserted)
        parts = [f"none of the {role} instances that were asked has {name}"]
        if silent:
            parts.append(f"nobody listens at {silent}")
        if num_there > self._max_searched:
            parts.append(f"{num_there - self._max_searched} were not asked (--max-searched)")
        if search.denied is not None:
            shown = search.denied.first[:_SHOWN_BYTES].decode(errors="replace")
            parts.append(f"one says {shown}")
        return Problem("; ".join(parts), code=404)


def _is_deserted(error: BaseException) -> bool:
    """The machine says that no process listens there."""
    reason = getattr(error, "os_error", error)
    return isinstance(reason, OSError) and reason.errno == errno.ECONNREFUSED
