"""A promised page whose read fails is asked for again while there is time.

What is promised was stored once, so storage that fails now mostly works in a moment: a request that
was lost, a server that starts again. After a failure the lookup rests: nothing is asked for it,
and what storage does for it meanwhile goes on. Then all that has failed is asked for again, the
earliest page first; each page so many times, with pauses that double, and once more soon after the
last of them; no pause ends after the lookup's deadline.

Storage that stays away is not waited for by everybody: once a page was asked for in vain as often
as it may be, no other one of that lane is asked for again until something comes from there.

What hangs is not asked again: its thread is still in it. Nor what is damaged: the tier has read
that twice. Everything here runs on the event loop's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ucm.outcome import Outcome
from ucm.store.node.io_threads import LanePool, error_reason
from ucm.store.node.lookup_state import LookupJob
from ucm.store.node.parts import NodeParts


@dataclass(eq=False, slots=True)
class _AskedAgain:
    """Of one lookup. `of`: how often each block was asked for again."""

    of: Counter[int]
    is_resting: bool = False


class PromisedAgain:
    """`go_on` is called with a lookup that has rested."""

    def __init__(self, parts: NodeParts, go_on: Callable[[LookupJob], None]) -> None:
        self._tiers = parts.tiers
        self._rules = parts.limits.promised
        self._clock = parts.clock
        self._call_later = parts.call_later
        self._count = parts.count
        self._notices = parts.notices
        self._go_on = go_on
        self._tries: dict[LookupJob, _AskedAgain] = {}
        # Where a page was asked for in vain, and nothing has been read since.
        self._vain: set[LanePool] = set()

    def rests(self, job: LookupJob) -> bool:
        tries = self._tries.get(job)
        return tries is not None and tries.is_resting

    def forget(self, job: LookupJob) -> None:
        """It has ended."""
        self._tries.pop(job, None)

    def has_read(self, pool: LanePool) -> None:
        """A page has come from there."""
        self._vain.discard(pool)

    def lookup_failed(
        self, job: LookupJob, blocks: Sequence[int], error: Exception, *, is_far: bool = False
    ) -> None:
        """Storage could not tell of these: they are asked about once more, or can't be had."""
        self._notices.warn("lookup_failed", error)
        if not blocks:
            return
        lanes = self._tiers[1 if is_far else 0].reads
        reason, pool = error_reason(error), lanes.of(job.keys[blocks[0]])
        is_passing = reason is Outcome.IO_ERROR
        if is_passing and self.tries_again(job, blocks[0], pool):
            job.not_in_storage(blocks)
        else:
            job.lose(blocks[0], reason)

    def tries_again(self, job: LookupJob, i: int, pool: LanePool) -> bool:
        """Block `i` could not be had there. Whether it is to be asked for once more, when the
        lookup has rested."""
        if i >= min(job.promised, job.end) or pool in self._vain:
            return False
        tries = self._tries.setdefault(job, _AskedAgain(Counter()))
        num_tries, retries = tries.of[i], self._rules.retries
        if num_tries > retries or not retries:
            self._vain.add(pool)
            return False
        # The last one soon after the one before: a server that is back lets one request through at
        # first, and what was asked with that has failed without being asked.
        pause_s = self._rules.first_pause_s * (2**num_tries if num_tries < retries else 1)
        if self._clock() + pause_s >= job.deadline_s:
            return False
        tries.of[i] += 1
        self._count("promised_again")
        if not tries.is_resting:
            tries.is_resting = True
            self._call_later(pause_s, partial(self._rested, job, tries))
        return True

    def _rested(self, job: LookupJob, tries: _AskedAgain) -> None:
        tries.is_resting = False
        if not job.closed:
            self._go_on(job)
