"""Promised pages that are not here yet: who waits for them, and looking for them in storage.

What an engine on this node computes is told (`arrived`); storage has to be asked. A look asks for
the last promised key first: blocks are published in the order of the prompt, so once that is there
a block before it that is not has been removed. Looks that find nothing new come ever more seldom,
and next to never while an engine of this node brings the pages.

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
from ucm.store.node.lanes import Lanes
from ucm.store.node.lookup import FIRST_PROBE, LookupJob
from ucm.store.node.pool import Pool
from ucm.store.tiers.tier import Tier

CallLater = Callable[[float, Callable[[], None]], object]

FIRST_PAUSE_S = 0.001
LAST_PAUSE_S = 0.05
# After so long a page may be there unseen (`names.py`). To doubt costs storage a few writes.
FIRST_DOUBT_S = 0.2
LAST_DOUBT_S = 1.0
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
    pool: Pool
    blocks: Sequence[int]
    last: int
    doubted: Sequence[Key]
    is_overdue: bool = False


class Promises:
    """`on_looked(job, blocks, result)` gets a `Looked`, or the error of storage."""

    def __init__(
        self,
        *,
        tier: Tier | None,
        reads: Lanes,
        call_later: CallLater,
        clock: Callable[[], float],
        on_looked: Callable[[LookupJob, Sequence[int], object], None],
    ) -> None:
        self._tier = tier
        self._reads = reads
        self._call_later = call_later
        self._clock = clock
        self._on_looked = on_looked
        self._wanted: defaultdict[Key, list[tuple[LookupJob, int]]] = defaultdict(list)
        # By lane: who waits for a turn to look, the longest first; and who looks.
        self._turns: defaultdict[Pool, dict[LookupJob, None]] = defaultdict(dict)
        self._looks: defaultdict[Pool, set[_Look]] = defaultdict(set)

    def want(self, job: LookupJob, i: int) -> None:
        """Storage has to be asked for promised block `i`, or an engine brings it."""
        if i in job.wanted:
            return
        job.wanted.add(i)
        self._wanted[job.keys[i]].append((job, i))

    def take_wanted(self, key: Key) -> list[tuple[LookupJob, int]]:
        """Those who want `key` and don't any more. It is being filled, or here, or given up."""
        found = self._wanted.pop(key, [])
        for job, i in found:
            job.wanted.discard(i)
            job.no_probe(i)
        return found

    def probed(self, job: LookupJob, blocks: Sequence[int]) -> None:
        """Storage has these."""
        for i in blocks:
            self._unwant(job, i)

    def forget(self, job: LookupJob) -> None:
        for turns in self._turns.values():
            turns.pop(job, None)
        for i in list(job.wanted):
            self._unwant(job, i)

    def _unwant(self, job: LookupJob, i: int) -> None:
        if i not in job.wanted:
            return
        job.wanted.discard(i)
        key = job.keys[i]
        left = [each for each in self._wanted[key] if each != (job, i)]
        if left:
            self._wanted[key] = left
        else:
            del self._wanted[key]

    # -- looking ---------------------------------------------------------------------------

    def look(self, job: LookupJob) -> None:
        """Asks storage for the first blocks that are missing, when it is this lookup's turn."""
        missing = job.missing()
        if job.closed or job.look_pending or not missing or self._tier is None:
            return
        job.look_pending = True
        pool = self._reads.of(job.keys[missing[0]])
        self._turns[pool][job] = None
        self._take_turns(self._tier, pool)

    def _take_turns(self, tier: Tier, pool: Pool) -> None:
        turns, looks = self._turns[pool], self._looks[pool]
        most = max_looks(pool.num_threads)
        hangs = sum(look.is_overdue for look in looks) >= most
        while turns and (hangs or len(looks) < most):
            job = next(iter(turns))
            del turns[job]
            look = self._look_of(job, pool)
            if look is None:
                # They came another way, or what is missing now is of another lane.
                job.look_pending = False
                self.look(job)
            elif hangs:
                job.look_pending = False
                self._on_looked(job, look.blocks, _late())
            else:
                self._begin(tier, look)

    def _look_of(self, job: LookupJob, pool: Pool) -> _Look | None:
        """Only blocks of the first missing one's lane: if that hangs, those of others help nobody.
        None if that isn't the lane of `pool`."""
        missing = job.missing()[:FIRST_PROBE]
        blocks = [i for i in missing if self._reads.of(job.keys[i]) is pool]
        if not blocks or blocks[0] != missing[0]:
            return None
        last = job.promised - 1
        while self._reads.of(job.keys[last]) is not pool:
            last -= 1
        doubted = (job.keys[blocks[0]], job.keys[last]) if self._must_doubt(job) else ()
        return _Look(job, pool, blocks, last, doubted)

    def _begin(self, tier: Tier, look: _Look) -> None:
        self._looks[look.pool].add(look)
        look.pool.submit(
            partial(_ask, tier, look),
            partial(self._looked, tier, look),
            on_overdue=partial(self._overdue, tier, look),
            urgent=True,
        )

    def _must_doubt(self, job: LookupJob) -> bool:
        """At once for nobody, then ever more seldom while nothing comes."""
        now_s = self._clock()
        if job.doubt_s is None:
            job.doubt_s, job.doubt_pause_s = now_s + FIRST_DOUBT_S, FIRST_DOUBT_S / 2
        if now_s < job.doubt_s:
            return False
        job.doubt_pause_s = min(2 * job.doubt_pause_s, LAST_DOUBT_S)
        job.doubt_s = now_s + job.doubt_pause_s
        return True

    def take_heart(self, job: LookupJob) -> None:
        """A look has found something: the next ones come soon again."""
        job.pause_s, job.doubt_s = FIRST_PAUSE_S, None

    def look_later(self, job: LookupJob) -> None:
        """After a look that has found nothing."""
        if job.look_pending:
            return
        job.look_pending = True
        pause_s = FED_PAUSE_S if job.is_fed else job.pause_s
        job.pause_s = min(2 * job.pause_s, LAST_PAUSE_S)
        self._call_later(pause_s, partial(self._look_again, job))

    def _look_again(self, job: LookupJob) -> None:
        job.look_pending = False
        self.look(job)

    def _looked(self, tier: Tier, look: _Look, result: object) -> None:
        self._looks[look.pool].discard(look)
        look.job.look_pending = False
        self._take_turns(tier, look.pool)
        if not look.job.closed:
            self._on_looked(look.job, look.blocks, result)

    def _overdue(self, tier: Tier, look: _Look) -> None:
        """It keeps its thread until it returns, and its lookup waits no longer."""
        look.is_overdue = True
        if not look.job.closed:
            self._on_looked(look.job, look.blocks, _late())
        self._take_turns(tier, look.pool)


def _late() -> TierError:
    return TierError(
        "storage hangs: it can't say whether a promised page is there", reason=Outcome.TIMEOUT
    )


def _ask(tier: Tier, look: _Look) -> Looked:
    job, namespace = look.job, look.job.namespace.tier
    for key in look.doubted:
        tier.doubt(namespace, key)
    last_there = tier.contains_now(namespace, job.keys[look.last])
    leading = 0
    keys = [job.keys[i] for i in look.blocks]
    while leading < len(keys) and tier.contains_now(namespace, keys[leading]):
        leading += 1
    is_very_last = look.last == job.promised - 1
    return Looked(leading, last_there, all_there=last_there and is_very_last)
