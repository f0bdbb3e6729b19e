"""The head of a prompt, which the client of a lookup has itself: how much of it is stored?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from ucm.store.blocks.keys import Key
from ucm.store.node.lookup_state import LookupJob
from ucm.store.node.parts import NodeParts
from ucm.store.node.writeback import WriteBack


class Heads:
    """Owned by the event loop's thread. `answer` is called when storage has told of a head."""

    def __init__(
        self, parts: NodeParts, writeback: WriteBack, answer: Callable[[LookupJob], None]
    ) -> None:
        self._slots = parts.slots
        self._tier = parts.tier
        self._reads = parts.reads
        self._writeback = writeback
        self._answer = answer

    def scan(self, job: LookupJob) -> None:
        self._count(job)
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
        return self._slots.find(key) is not None or self._writeback.was_stored(key)

    def note_stored(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._writeback.note_stored(key)
