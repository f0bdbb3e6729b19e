"""Looking in storage for promised pages that are not here yet.

What an engine on this node computes is told; storage has to be asked. A look asks for the last
promised key first: blocks are published in the order of the prompt, so once that is there a block
before it that is not has been removed, or comes within a moment (`abreast.py`). For the same reason
the last is not there while the first that is missing isn't: after a look that has found nothing the
next ones ask for that alone, until it is time to doubt. Looks that find nothing new come ever more
seldom, and next to never while an engine of this node brings the pages. While pages come one after
the other, as slow storage lets them, the next look is when a share of what is missing is due: so
there are no more of them where storage is slower.

Any number may wait for one prompt. One look is for all of them who lack the same blocks of it, and
who has come last waits as long for the next one as the others.

Any number of hand-offs may wait, for long, and storage may be slow. So looks take turns at a few
of the threads (`max_looks`), and those who only ask find the others free. Everything here runs on
the event loop's thread; only `_ask` is on an I/O thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf

from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node.io_threads import LanePool
from ucm.store.node.lookup_state import FIRST_PROBE, LookupJob
from ucm.store.node.parts import NodeParts
from ucm.store.tiers.tier import Tier

FIRST_PAUSE_S = 0.001
LAST_PAUSE_S = 0.05
# Of the time until all that is missing is due at the pace it comes in, and of that of one page.
DUE_SHARE = 1 / 4
PAGE_SHARE = 1 / 2
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


def due_pause_s(num_found: int, in_s: float, num_left: int) -> float:
    """How long to wait for more after so many came in so long. What comes after a longer pause than
    looks make comes in a burst, whose pace nobody knows yet. Pure."""
    if in_s > LAST_PAUSE_S:
        return FIRST_PAUSE_S
    pause_s = in_s / num_found * max(PAGE_SHARE, DUE_SHARE * num_left)
    return min(max(pause_s, FIRST_PAUSE_S), LAST_PAUSE_S / 2)


def max_looks(num_threads: int) -> int:
    """Less than half of the threads, where there are more than two: so looks that hang don't make
    storage look stalled to everybody else."""
    return max(1, (num_threads - 1) // 2)


@dataclass(eq=False, slots=True)
class _Look:
    """One that has a thread, or is about to. All it asks for is of one lane, whose last promised
    block is `last`. `others` wait for the same blocks. `is_for_last`: it asks for that in any case,
    not only when the first that is missing has come."""

    job: LookupJob
    pool: LanePool
    blocks: Sequence[int]
    last: int
    doubted: Sequence[Key] = ()
    is_for_last: bool = True
    began_s: float = 0.0
    others: list[LookupJob] = field(default_factory=list)
    is_overdue: bool = False

    def asks_the_same(self, other: _Look) -> bool:
        """Each key stands for all before it."""
        mine, its = self.job, other.job
        return (
            mine.namespace.tier.fingerprint == its.namespace.tier.fingerprint
            and self.blocks == other.blocks
            and self.last == other.last
            and mine.keys[self.last] == its.keys[self.last]
            and mine.promised == its.promised
            and all(mine.keys[i] == its.keys[i] for i in self.blocks)
        )


@dataclass(slots=True)
class _Pace:
    """When a lookup is to be looked for again. `is_looking`: a look for it is under way. `pauses`
    counts its pauses, so that one that was cut short ends nothing. `doubt_s`: when to doubt next
    that what can't be seen isn't there; None if the next look asks for the last in any case.
    `last_there_s`: when that was first seen. `found_s`: when something was found. `look_s`: how
    long the latest look took; the next one comes no sooner than that after it."""

    is_pending: bool = False
    is_looking: bool = False
    pauses: int = 0
    pause_s: float = FIRST_PAUSE_S
    doubt_s: float | None = None
    last_there_s: float | None = None
    found_s: float = -inf
    look_s: float = 0.0
    doubt_pause_s: float = 0.0

    def doubts_as(self, other: _Pace) -> None:
        self.doubt_s, self.doubt_pause_s = other.doubt_s, other.doubt_pause_s


class Looks:
    """`on_looked(job, blocks, result)` gets a `Looked`, or the error of storage. For a lookup that
    `rests` nothing is looked for: who lets it rest asks again."""

    def __init__(
        self,
        parts: NodeParts,
        on_looked: Callable[[LookupJob, Sequence[int], object], None],
        rests: Callable[[LookupJob], bool],
    ) -> None:
        self._tier = parts.tier
        self._reads = parts.reads
        self._call_later = parts.call_later
        self._clock = parts.clock
        self._on_looked = on_looked
        self._rests = rests
        self._paces: defaultdict[LookupJob, _Pace] = defaultdict(_Pace)
        # By lane: who waits for a turn to look, the longest first; and who looks.
        self._turns: defaultdict[LanePool, dict[LookupJob, None]] = defaultdict(dict)
        self._looks: defaultdict[LanePool, set[_Look]] = defaultdict(set)
        # By the last promised key: who waits for that prompt.
        self._by_prompt: defaultdict[Key, dict[LookupJob, None]] = defaultdict(dict)

    def forget(self, job: LookupJob) -> None:
        """It has ended."""
        if self._paces.pop(job, None) is not None:
            last = job.keys[job.promised - 1]
            self._by_prompt[last].pop(job, None)
            if not self._by_prompt[last]:
                del self._by_prompt[last]
        for turns in self._turns.values():
            turns.pop(job, None)

    def look(self, job: LookupJob) -> None:
        """Asks storage for the first blocks that are missing, when it is this lookup's turn."""
        missing = job.missing()
        if job.closed or not missing or not self._reads.pools or self._paces[job].is_pending:
            return
        if self._rests(job):
            return
        self._paces[job].is_pending = True
        self._by_prompt[job.keys[job.promised - 1]][job] = None
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
        return _Look(job, pool, blocks, last)

    def _begin(self, look: _Look) -> None:
        self._take_along(look)
        job = look.job
        # Once the last is there one look tells of all.
        unknown = job.unknown(most=job.promised, stop=job.promised)
        look.blocks = [i for i in unknown if self._reads.of(job.keys[i]) is look.pool]
        is_first = self._paces[job].doubt_s is None
        look.is_for_last = is_first or self._tier.publishes_abreast
        if self._must_doubt(job):
            look.is_for_last = True
            look.doubted = (job.keys[look.blocks[0]], job.keys[look.last])
        for each in look.others:
            self._paces[each].doubts_as(self._paces[job])
        look.began_s = self._clock()
        self._looks[look.pool].add(look)
        look.pool.submit(
            partial(_ask, self._tier, look),
            partial(self._looked, look),
            on_overdue=partial(self._overdue, look),
            urgent=True,
        )

    def _take_along(self, look: _Look) -> None:
        """All who wait for the same blocks and whom no look is under way for: their pauses end, and
        the next ones are as long as the longest of them."""
        job, pool = look.job, look.pool
        for each in self._by_prompt[job.keys[job.promised - 1]]:
            if each is job or self._paces[each].is_looking:
                continue
            its = self._look_of(each, pool)
            if its is not None and look.asks_the_same(its):
                look.others.append(each)
        all_paces = [self._paces[each] for each in (job, *look.others)]
        pause_s = max(pace.pause_s for pace in all_paces)
        for pace in all_paces:
            pace.is_pending = pace.is_looking = True
            pace.pauses += 1
            pace.pause_s = pause_s
        # Who comes later puts off nobody's doubt.
        first = min(all_paces, key=lambda pace: inf if pace.doubt_s is None else pace.doubt_s)
        self._paces[job].doubts_as(first)
        for turns in self._turns.values():
            for each in look.others:
                turns.pop(each, None)

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

    def found(self, job: LookupJob, num_found: int, *, last_there: bool) -> None:
        """A look has found so many: the next one comes soon again, or when more are due. Once the
        last is there it tells of a hole at once."""
        pace, now_s = self._paces[job], self._clock()
        missing = job.missing()
        num_left = job.promised - missing[0] if missing else 0
        pace.pause_s = due_pause_s(num_found, now_s - pace.found_s, num_left)
        pace.found_s, pace.last_there_s = now_s, None
        pace.doubt_s = None if last_there else now_s + FIRST_DOUBT_S
        pace.doubt_pause_s = FIRST_DOUBT_S / 2

    def look_later(self, job: LookupJob) -> None:
        """After a look that has found nothing."""
        pace = self._paces[job]
        if pace.is_pending or self._rests(job):
            return
        pace.is_pending = True
        pace.pause_s = max(pace.pause_s, pace.look_s)
        pause_s = FED_PAUSE_S if job.is_fed else pace.pause_s
        pace.pause_s = min(2 * pace.pause_s, LAST_PAUSE_S)
        pace.pauses += 1
        self._call_later(pause_s, partial(self._look_again, job, pace.pauses))

    def _look_again(self, job: LookupJob, pause: int) -> None:
        if not job.closed and self._paces[job].pauses == pause:
            self._paces[job].is_pending = False
            self.look(job)

    def _looked(self, look: _Look, result: object) -> None:
        self._looks[look.pool].discard(look)
        for job in (look.job, *look.others):
            if not job.closed:
                pace = self._paces[job]
                pace.is_pending = pace.is_looking = False
                pace.look_s = min(self._clock() - look.began_s, LAST_PAUSE_S)
        self._take_turns(look.pool)
        self._tell(look, result)

    def _believed(self, job: LookupJob, look: _Look, result: object) -> object:
        """What lies before the last may still be on its way, for a while."""
        if not isinstance(result, Looked) or not self._tier.publishes_abreast:
            return result
        if not result.last_there or result.leading == len(look.blocks):
            return result
        pace, now_s = self._paces[job], self._clock()
        if pace.last_there_s is None:
            pace.last_there_s = now_s
        if now_s - pace.last_there_s >= ABREAST_S:
            return result
        return Looked(result.leading, last_there=False, all_there=False)

    def _overdue(self, look: _Look) -> None:
        """It keeps its thread until it returns, and its lookups wait no longer."""
        look.is_overdue = True
        self._tell(look, _late())
        self._take_turns(look.pool)

    def _tell(self, look: _Look, result: object) -> None:
        for job in (look.job, *look.others):
            if not job.closed:
                self._on_looked(job, look.blocks, self._believed(job, look, result))


def _late() -> TierError:
    return TierError(
        "storage hangs: it can't say whether a promised page is there", reason=Outcome.TIMEOUT
    )


def _ask(tier: Tier, look: _Look) -> Looked:
    job, namespace = look.job, look.job.namespace.tier
    for key in look.doubted:
        tier.doubt(namespace, key)
    keys = [job.keys[i] for i in look.blocks]
    is_very_last = look.last == job.promised - 1
    if not look.is_for_last:
        leading = tier.leads_to(namespace, keys, now=True)
        last_there = leading == len(keys) and look.blocks[-1] == look.last
        return Looked(leading, last_there, all_there=last_there and is_very_last)
    last_there = tier.contains_now(namespace, job.keys[look.last])
    # What was published before a page that is there is not asked for one by one.
    most = len(keys) if last_there else FIRST_PROBE
    leading = tier.leads_to(namespace, keys[:most], now=not last_there)
    return Looked(leading, last_there, all_there=last_there and is_very_last)
