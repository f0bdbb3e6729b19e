"""What decode is told of a request's prefill, and what is done when that turns out to be wrong.

    the prefill       decode is told
    runs              Expected
    has ended well    its receipt
    has failed, or    Withdrawn, if this request has been Expected before;
    gave no receipt   else Wanted, if a receipt of its answer is of use

A request some of whose prompts have no prefill is told nothing: what is said to an engine it takes
to be about each of them.

Decode may wait for what it expects, which is the whole prompt. So a request that waits for a
prefill that fails, or that promises less, is cancelled and sent anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import msgspec

from ucm import handoff
from ucm.pd.legs import bodies
from ucm.pd.legs.delivery import Answer, Problem
from ucm.pd.legs.prefill import PrefillOutcome, Share
from ucm.pd.legs.rewrite import ANSWER_WANTED, with_params
from ucm.pd.legs.usage import FoundCached
from ucm.pd.trace import RequestTrace

logger = logging.getLogger(__name__)

# An engine that hasn't noticed that the first request has ended would refuse the same id.
WITHDRAWN_SUFFIX = "-w"

_EXPECTED = msgspec.json.encode(handoff.params(handoff.Expected()))
_WITHDRAWN = msgspec.json.encode(handoff.params(handoff.Withdrawn()))

# Sends this body, with this behind the request's id: the beginning of the answer, or what is wrong.
Ask = Callable[[bytes | None, str], Coroutine[Any, Any, Answer | Problem]]


def told(
    outcome: PrefillOutcome | None, *, was_expected: bool, wants_receipt: bool = False
) -> bytes | None:
    """The `kv_transfer_params` for decode; None if there is nothing to say. Pure. A prefill without
    an outcome runs. Who has been promised something gives a receipt of its answer unasked."""
    if outcome is None:
        return _EXPECTED
    if outcome.failure is None and outcome.receipt is not None:
        return outcome.receipt
    if was_expected:
        return _WITHDRAWN
    return ANSWER_WANTED if wants_receipt else None


def keeps_what_was_expected(outcome: PrefillOutcome) -> bool:
    """Pure. Other connectors have receipts of their own, and expect nothing."""
    if outcome.failure is not None or outcome.receipt is None:
        return False
    words = handoff.parse(msgspec.json.decode(outcome.receipt))
    return not isinstance(words, handoff.Receipt) or words.is_whole


class PrefillPromise:
    """One request's prefill, as far as decode is concerned. Owned by the request's task, which
    leaves it when it is over; `linger_s` after the first byte of decode's answer it is left
    already. A prefill that decode has loaded from has said by then what it had found."""

    def __init__(
        self,
        share: Share,
        trace: RequestTrace,
        *,
        is_told: bool = True,
        wants_receipt: bool = False,
        linger_s: float = 0.0,
    ) -> None:
        self.is_told = is_told
        self._wants_receipt = wants_receipt
        self._linger_s = linger_s
        self._leaving: asyncio.TimerHandle | None = None
        self._share = share
        self._trace = trace
        self._was_expected = False
        self._is_over = False
        self._began_s = time.monotonic()
        trace.path = "shared-prefill" if share.is_shared else "pd"
        share.task.add_done_callback(self._ended)

    @property
    def outcome(self) -> PrefillOutcome | None:
        """None while it runs."""
        return self._share.outcome

    async def settled(self) -> None:
        """Until the prefill has ended, well or not."""
        await asyncio.wait({self._share.task})

    def leave(self) -> None:
        """The prefill is of no more use to this request: it goes on for others, if there are."""
        if not self._is_over:
            self._end()
        if self._leaving is not None:
            self._leaving.cancel()
        self._share.leave()

    async def found(self) -> FoundCached | None:
        """What prefill had of the prompt before; None if it isn't known within `linger_s`, or for
        a part of the prompts only."""
        if not self.is_told:
            return None
        if not self._share.task.done():
            await asyncio.wait({self._share.task}, timeout=self._linger_s)
        outcome = self._share.outcome
        if outcome is None or outcome.failure is not None:
            return None
        if outcome.found is None and outcome.by is not None and not outcome.by.is_known_as_mute:
            outcome.by.is_known_as_mute = True
            logger.warning(
                "prefill %s does not say what it finds cached, so clients are told what decode "
                "does: start it with --enable-prompt-tokens-details",
                outcome.by.url,
            )
        return outcome.found

    async def keep(self, ask: Ask, body: bytes) -> Answer | Problem:
        """Asks decode; once more if it was told to expect a prefill that fails before it answers.
        `body` is the client's."""
        was_done = self._share.task.done()  # as it is when the words for decode are chosen
        asked = await self._body(body)
        if was_done:
            return self._left_if_answered(await ask(asked, ""))
        asking = asyncio.create_task(ask(asked, ""))
        try:
            await asyncio.wait({asking, self._share.task}, return_when=asyncio.FIRST_COMPLETED)
            outcome = self._share.outcome
            if outcome is not None and not keeps_what_was_expected(outcome):
                asking.cancel()
            await asyncio.wait({asking})
        except BaseException:
            await _drop(asking)
            raise
        if asking.cancelled():
            self._trace.withdrawn()
            return self._left_if_answered(await ask(await self._body(body), WITHDRAWN_SUFFIX))
        return self._left_if_answered(asking.result())

    async def _body(self, body: bytes) -> bytes:
        if not self.is_told:
            return body
        params = told(
            self._share.outcome,
            was_expected=self._was_expected,
            wants_receipt=self._wants_receipt,
        )
        self._was_expected = self._was_expected or params is _EXPECTED
        if params is None:
            return body
        return await bodies.apart(partial(with_params, body, params), num_bytes=len(body))

    def _left_if_answered(self, found: Answer | Problem) -> Answer | Problem:
        """Who answers before its prefill has ended has found or computed everything itself."""
        if not isinstance(found, Answer):
            return found
        if self._share.task.done() or found.upstream.status >= 300 or not self._linger_s:
            self.leave()
        else:
            if not self._is_over:
                self._end()
            loop = asyncio.get_running_loop()
            self._leaving = loop.call_later(self._linger_s, self._share.leave_outrun)
        return found

    def _ended(self, _: asyncio.Task[PrefillOutcome]) -> None:
        if self._is_over:
            return
        self._end()
        outcome = self._share.outcome
        if outcome is not None and outcome.failure is not None:
            self._trace.not_prefilled(outcome.failure)

    def _end(self) -> None:
        self._is_over = True
        self._trace.spent("prefill", time.monotonic() - self._began_s)


async def _drop(asking: asyncio.Task[Answer | Problem]) -> None:
    """It may have found an answer in the meantime, which nobody will read."""
    asking.cancel()
    await asyncio.wait({asking})
    if asking.cancelled() or asking.exception() is not None:
        return
    if isinstance(found := asking.result(), Answer):
        found.close()
