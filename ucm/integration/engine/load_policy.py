"""`load_policy`: what the engine knows of its own speed and of its loads', and what it makes of it.

    steps ──► PrefillMeter ──┐
    ranks ──► copied         ├──► Estimates ──► load_worth.py decides
    node cache ──► read      ┘

What is refused is tried again now and then, or an estimate would never get better: of a hit in
memory a load, once in EXPLORE_S; of one in files some pages, which are read beside the request that
does without them (`explorer.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ucm.integration.engine.counts import Counts
from ucm.integration.engine.load_worth import Estimates, read_costs, worth_copying
from ucm.integration.engine.prefill_meter import PrefillMeter
from ucm.integration.engine.rates import Recent
from ucm.outcome import Outcome
from ucm.store.node import protocol as p

EXPLORE_S = 10.0


class LoadPolicy:
    """Of one engine, owned by its thread. Without `is_auto` everything is loaded."""

    def __init__(
        self,
        *,
        is_auto: bool,
        block_tokens: int,
        max_step_tokens: int,
        stats: Counts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.prefill = PrefillMeter(max_step_tokens, clock)
        self._is_auto = is_auto
        self._block_tokens = block_tokens
        self._stats = stats
        self._clock = clock
        self._copies, self._reads = Recent(), Recent()
        self._tried_copy_s = float("-inf")

    # -- what is decided ---------------------------------------------------------------------

    def read_costs(self) -> p.ReadCosts | None:
        """What the node cache is to weigh a hit in files with."""
        if not self._is_auto:
            return None
        return read_costs(self.estimates(), block_tokens=self._block_tokens)

    def takes(self, num_tokens: int) -> bool:
        """Whether to load so many tokens from memory."""
        if not self._is_auto or worth_copying(num_tokens, self.estimates()):
            return True
        now_s = self._clock()
        if now_s - self._tried_copy_s < EXPLORE_S:
            return False
        self._tried_copy_s = now_s
        return True

    def estimates(self) -> Estimates:
        return Estimates(self.prefill.token_s(), self._copies.line(), self._reads.line())

    # -- what is learnt ----------------------------------------------------------------------

    def step_ended(self, number: int) -> None:
        self.prefill.ended(number)
        self._show("compute", self.prefill.token_s())

    def copied(self, num_tokens: int, seconds: float) -> None:
        """The ranks have loaded so much."""
        self._copies.add(num_tokens, seconds)
        line = self._copies.line()
        self._show("memory", None if line is None else line.each_s)

    def read(self, reply: p.LookupReply) -> None:
        """Storage has brought so much, or nothing in all the time that it was given."""
        was_late = reply.reason is Outcome.TIMEOUT
        num_pages = max(reply.from_files, int(was_late))
        if not num_pages or not reply.read_us:
            return
        self._reads.add(num_pages * self._block_tokens, reply.read_us / 1e6)
        line = self._reads.line()
        self._show("files", None if line is None else line.each_s)

    def _show(self, source: str, token_s: float | None) -> None:
        if token_s:
            self._stats.gauge("ucm_estimated_tokens_per_second", 1 / token_s, of=source)
