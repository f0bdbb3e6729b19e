"""The head of a prompt, which the client of a lookup has itself: how much of it is stored?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from ucm.store.blocks.keys import Key
from ucm.store.node.lanes import Lanes
from ucm.store.node.lookup import LookupJob
from ucm.store.node.slots import SlotTable
from ucm.store.node.writeback import WriteBack
from ucm.store.tiers.tier import Tier


class Heads:
    """Owned by the event loop's thread. `answer` is called when storage has told of a head."""

    def __init__(
        self,
        *,
        slots: SlotTable,
        tier: Tier | None,
        reads: Lanes,
        writeback: WriteBack | None,
        answer: Callable[[LookupJob], None],
    ) -> None:
        self._slots = slots
        self._tier = tier
        self._reads = reads
        self._writeback = writeback
        self._answer = answer

    def scan(self, job: LookupJob) -> None:
        self._count(job)
        if self._tier is None:
            return
        unknown = [k for k in job.keys[job.head_stored : job.read_from] if not self._is_stored(k)]
        for pool, asked in self._reads.split(unknown, lambda key: key):
            if pool.stalled:
                continue
            job.head_probes += 1
            pool.submit(
                partial(self._tier.contains, job.namespace.tier, asked),
                partial(self._probed, job, asked),
                urgent=True,
            )

    def _probed(self, job: LookupJob, asked: list[Key], result: object) -> None:
        self.note_stored(asked[: result if isinstance(result, int) else 0])
        self._count(job)
        job.head_probes -= 1
        self._answer(job)

    def _count(self, job: LookupJob) -> None:
        while job.head_stored < job.read_from and self._is_stored(job.keys[job.head_stored]):
            job.head_stored += 1

    def _is_stored(self, key: Key) -> bool:
        """In this node's memory, or seen in the tier a moment ago."""
        if self._slots.find(key) is not None:
            return True
        return self._writeback is not None and self._writeback.was_stored(key)

    def note_stored(self, keys: Iterable[Key]) -> None:
        if self._writeback is not None:
            for key in keys:
                self._writeback.note_stored(key)
