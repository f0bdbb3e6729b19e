"""Finds: where is each of these keys? For the store API, whose blocks stand for themselves.

Memory answers at once. Storage is asked in parallel, in groups, about what memory can't answer; at
the deadline the rest is nowhere, with a reason. Everything here runs on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ucm.errors import ProtocolError
from ucm.store.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.io import Pool, error_reason
from ucm.store.node.state import Connection, OpenedNamespace
from ucm.store.node.writeback import WriteBack
from ucm.store.slots import SlotState, SlotTable
from ucm.store.tier import Tier, TierNamespace

_MAX_GROUP = 64


@dataclass(eq=False, slots=True)
class FindJob:
    """State of one find. `places[i]` grows by what is found out about `keys[i]`."""

    id: int
    connection: Connection
    keys: list[Key]
    places: bytearray
    deadline_s: float
    groups_running: int = 0
    reason: str = ""


class Finds:
    """All finds that wait for storage."""

    def __init__(
        self,
        *,
        slots: SlotTable,
        tier: Tier | None,
        reads: Pool,
        writeback: WriteBack | None,
        clock: Callable[[], float],
    ) -> None:
        self._slots = slots
        self._tier = tier
        self._reads = reads
        self._writeback = writeback
        self._clock = clock
        self._open: dict[tuple[Connection, int], FindJob] = {}

    @property
    def num_open(self) -> int:
        return len(self._open)

    def start(self, connection: Connection, namespace: OpenedNamespace, message: p.Find) -> None:
        if (connection, message.id) in self._open:
            raise ProtocolError(f"find {message.id} is still open")
        keys = [Key(key) for key in message.keys]
        job = FindJob(
            id=message.id,
            connection=connection,
            keys=keys,
            places=bytearray(map(self._place, keys)),
            deadline_s=self._clock() + message.timeout_ms / 1000,
        )
        self._open[connection, message.id] = job
        enough = p.IN_STORAGE | (p.QUEUED if message.storage else p.IN_MEMORY)
        unknown = [i for i, place in enumerate(job.places) if not place & enough]
        if unknown and self._reads.stalled:
            job.reason = "timeout"
        elif unknown and self._tier is not None:
            self._ask_storage(job, self._tier, namespace.tier, unknown)
        self._answer_if_settled(job)

    def withdraw_all(self, connection: Connection) -> None:
        for owner, find_id in list(self._open):
            if owner is connection:
                del self._open[owner, find_id]

    def tick(self) -> None:
        """Answers finds whose deadline has passed with what is known."""
        now_s = self._clock()
        for job in list(self._open.values()):
            if now_s >= job.deadline_s:
                job.reason = "timeout"
                job.groups_running = 0
                self._answer_if_settled(job)

    def _place(self, key: Key) -> int:
        slot = self._slots.find(key)
        place = p.IN_MEMORY if slot is not None and slot.state is SlotState.READY else 0
        if self._writeback is not None:
            if self._writeback.was_stored(key):
                place |= p.IN_STORAGE
            elif self._writeback.is_safe(key):
                place |= p.QUEUED
        return place

    def _ask_storage(
        self, job: FindJob, tier: Tier, namespace: TierNamespace, unknown: list[int]
    ) -> None:
        num_threads = self._reads.num_threads
        size = min(_MAX_GROUP, -(-len(unknown) // num_threads))
        groups = [unknown[i : i + size] for i in range(0, len(unknown), size)]
        job.groups_running = len(groups)
        for group in groups:
            self._reads.submit(
                partial(_stored_of, tier, namespace, [job.keys[i] for i in group]),
                partial(self._on_asked, job, group),
            )

    def _on_asked(self, job: FindJob, group: list[int], result: object) -> None:
        if self._open.get((job.connection, job.id)) is not job:
            return
        job.groups_running -= 1
        if isinstance(result, list):
            for i in (i for i, stored in zip(group, result, strict=True) if stored):
                job.places[i] |= p.IN_STORAGE
                if self._writeback is not None:
                    self._writeback.note_stored(job.keys[i])
        else:
            job.reason = error_reason(result)
        self._answer_if_settled(job)

    def _answer_if_settled(self, job: FindJob) -> None:
        if job.groups_running == 0:
            del self._open[job.connection, job.id]
            job.connection.send(p.Found(id=job.id, places=bytes(job.places), reason=job.reason))


def _stored_of(tier: Tier, namespace: TierNamespace, keys: Sequence[Key]) -> list[bool]:
    """Which of `keys` are there, each by itself: the tier only counts from the first."""
    stored: list[bool] = []
    while len(stored) < len(keys):
        num_there = tier.contains(namespace, keys[len(stored) :])
        stored += [True] * num_there
        if len(stored) < len(keys):
            stored.append(False)
    return stored
