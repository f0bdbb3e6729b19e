"""Looking in storage for promised pages that are not here yet.

What an engine on this node computes is told; storage has to be asked. A look asks for the last
promised key first: blocks are published in the order of the prompt, so once that is there a block
before it that is not has been removed, or comes within a moment (`abreast.py`). Looks that find
nothing new come ever more seldom, and next to never while an engine of this node brings the pages.

Any number of hand-offs may wait, for long, and storage may be slow. So looks take turns at a few
of the threads (`max_looks`), and those who only ask find the others free. Everything here runs on
the event loop's thread; only `_ask` is on an I/O thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node.io_threads import LanePool
from ucm.store.node.lookup_state import LookupJob
from ucm.store.node.parts import NodeParts
from ucm.store.tiers.tier import Tier

FIRST_PAUSE_S = 0.001
LAST_PAUSE_S = 0.05
# After so long a page may be there unseen (`posix/revalidate.py`). To doubt costs a few writes.
FIRST_DOUBT_S = 0.2
LAST_DOUBT_S = 0.8
# Where pages are published side by side, one before the last may come so much later.
ABREAST_S = 2.0
# An engine of this node brings the pages: a look is for what it might not know of.
FED_PAUSE_S = 1.0


@dataclass(frozen=True)
class Looked:
    """`leading` of the blocks asked for are there. `last_there`: so was a later promised block,
    before they were asked for. `all_there`: and that was the last one."""

    leading: int
    last_there: bool
    all_there: bool


def max_looks(num_threads: int) -> int:
    """Less than half of the threads, where there are more than two: so looks that hang don't make
    storage look stalled to everybody else."""
    return max(1, (num_threads - 1) // 2)


@dataclass(eq=False, slots=True)
class _Look:
    """One that has a thread, or is about to. All it asks for is of one lane, whose last promised
    block is `last`."""

    job: LookupJob
    pool: LanePool
    blocks: Sequence[int]
    last: int
    doubted: Sequence[Key]
    is_overdue: bool = False


@dataclass(slots=True)
class _Pace:
    """When a lookup is to be looked for again. `doubt_s`: when to doubt next that what can't be
    seen isn't there; None before the first look. `last_there_s`: when the last was first seen."""

    is_pending: bool = False
    pause_s: float = FIRST_PAUSE_S
    doubt_s: float | None = None
    last_there_s: float | None = None
    doubt_pause_s: float = 0.0


class Looks:
    """`on_looked(job, blocks, result)` gets a `Looked`, or the error of storage."""

    def __init__(
        self, parts: NodeParts, on_looked: Callable[[LookupJob, Sequence[int], object], None]
    ) -> None:
        self._tier = parts.tier
        self._reads = parts.reads
        self._call_later = parts.call_later
        self._clock = parts.clock
        self._on_looked = on_looked
        self._paces: defaultdict[LookupJob, _Pace] = defaultdict(_Pace)
        # By lane: who waits for a turn to look, the longest first; and who looks.
        self._turns: defaultdict[LanePool, dict[LookupJob, None]] = defaultdict(dict)
        self._looks: defaultdict[LanePool, set[_Look]] = defaultdict(set)

    def forget(self, job: LookupJob) -> None:
        """It has ended."""
        self._paces.pop(job, None)
        for turns in self._turns.values():
            turns.pop(job, None)

    def look(self, job: LookupJob) -> None:
        """Asks storage for the first blocks that are missing, when it is this lookup's turn."""
        missing = job.missing()
        if job.closed or not missing or not self._reads.pools or self._paces[job].is_pending:
            return
        self._paces[job].is_pending = True
        pool = self._reads.of(job.keys[missing[0]])
        self._turns[pool][job] = None
        self._take_turns(pool)

    def _take_turns(self, pool: LanePool) -> None:
        turns, looks = self._turns[pool], self._looks[pool]
        most = max_looks(pool.num_threads)
        hangs = sum(look.is_overdue for look in looks) >= most
        while turns and (hangs or len(looks) < most):
            job = next(iter(turns))
            del turns[job]
            look = self._look_of(job, pool)
            if look is None:
                # They came another way, or what is missing now is of another lane.
                self._paces[job].is_pending = False
                self.look(job)
            elif hangs:
                self._paces[job].is_pending = False
                self._on_looked(job, look.blocks, _late())
            else:
                self._begin(look)

    def _look_of(self, job: LookupJob, pool: LanePool) -> _Look | None:
        """Only blocks of the first missing one's lane: if that hangs, those of others help nobody.
        None if that isn't the lane of `pool`."""
        missing = job.missing()
        blocks = [i for i in missing if self._reads.of(job.keys[i]) is pool]
        if not blocks or blocks[0] != missing[0]:
            return None
        last = job.promised - 1
        while self._reads.of(job.keys[last]) is not pool:
            last -= 1
        doubted = (job.keys[blocks[0]], job.keys[last]) if self._must_doubt(job) else ()
        return _Look(job, pool, blocks, last, doubted)

    def _begin(self, look: _Look) -> None:
        self._looks[look.pool].add(look)
        look.pool.submit(
            partial(_ask, self._tier, look),
            partial(self._looked, look),
            on_overdue=partial(self._overdue, look),
            urgent=True,
        )

    def _must_doubt(self, job: LookupJob) -> bool:
        """At once for nobody, then ever more seldom while nothing comes."""
        now_s, pace = self._clock(), self._paces[job]
        if pace.doubt_s is None:
            pace.doubt_s, pace.doubt_pause_s = now_s + FIRST_DOUBT_S, FIRST_DOUBT_S / 2
        if now_s < pace.doubt_s:
            return False
        pace.doubt_pause_s = min(2 * pace.doubt_pause_s, LAST_DOUBT_S)
        pace.doubt_s = now_s + pace.doubt_pause_s
        return True

    def found(self, job: LookupJob) -> None:
        """A look has found something: the next ones come soon again."""
        pace = self._paces[job]
        pace.pause_s, pace.doubt_s, pace.last_there_s = FIRST_PAUSE_S, None, None

    def look_later(self, job: LookupJob) -> None:
        """After a look that has found nothing."""
        pace = self._paces[job]
        if pace.is_pending:
            return
        pace.is_pending = True
        pause_s = FED_PAUSE_S if job.is_fed else pace.pause_s
        pace.pause_s = min(2 * pace.pause_s, LAST_PAUSE_S)
        self._call_later(pause_s, partial(self._look_again, job))

    def _look_again(self, job: LookupJob) -> None:
        if not job.closed:
            self._paces[job].is_pending = False
            self.look(job)

    def _looked(self, look: _Look, result: object) -> None:
        self._looks[look.pool].discard(look)
        if not look.job.closed:
            self._paces[look.job].is_pending = False
        self._take_turns(look.pool)
        if not look.job.closed:
            self._on_looked(look.job, look.blocks, self._believed(look, result))

    def _believed(self, look: _Look, result: object) -> object:
        """What lies before the last may still be on its way, for a while."""
        if not isinstance(result, Looked) or not self._tier.publishes_abreast:
            return result
        if not result.last_there or result.leading == len(look.blocks):
            return result
        pace, now_s = self._paces[look.job], self._clock()
        if pace.last_there_s is None:
            pace.last_there_s = now_s
        if now_s - pace.last_there_s >= ABREAST_S:
            return result
        return Looked(result.leading, last_there=False, all_there=False)

    def _overdue(self, look: _Look) -> None:
        """It keeps its thread until it returns, and its lookup waits no longer."""
        look.is_overdue = True
        if not look.job.closed:
            self._on_looked(look.job, look.blocks, _late())
        self._take_turns(look.pool)


def _late() -> TierError:
    return TierError(
        "storage hangs: it can't say whether a promised page is there", reason=Outcome.TIMEOUT
    )


def _ask(tier: Tier, look: _Look) -> Looked:
    job, namespace = look.job, look.job.namespace.tier
    for key in look.doubted:
        tier.doubt(namespace, key)
    last_there = tier.contains_now(namespace, job.keys[look.last])
    leading = tier.leads_to(namespace, [job.keys[i] for i in look.blocks], now=True)
    is_very_last = look.last == job.promised - 1
    return Looked(leading, last_there, all_there=last_there and is_very_last)
