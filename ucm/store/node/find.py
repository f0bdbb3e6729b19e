"""Finds: where is each of these keys? For the store API, whose blocks stand for themselves, and
for models of which only windows are kept.

Memory answers at once. Storage is asked in parallel, in groups, about what memory can't answer; at
the deadline the rest is nowhere, with a reason. A find of what is in storage believes storage and
nothing else: what is not there, though it was once, is queued from memory or said to be missing.
Of two tiers either will do, unless it is asked what is in storage: then each is asked.
Everything here runs on the event loop's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ucm.errors import ProtocolError
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.io_threads import LanePool, error_reason
from ucm.store.node.lanes import Lanes
from ucm.store.node.parts import NodeParts
from ucm.store.node.saved import Saving
from ucm.store.node.sessions import Connection, OpenedNamespace
from ucm.store.node.slots import SlotState
from ucm.store.node.storing import Storing
from ucm.store.node.writeback import WriteBack
from ucm.store.tiers.tier import Tier, TierNamespace, held_of

_MAX_GROUP = 64


@dataclass(eq=False, slots=True)
class FindJob:
    """State of one find. `places[i]` grows by what is found out about `keys[i]`."""

    id: int
    connection: Connection
    namespace: OpenedNamespace
    keys: list[Key]
    places: bytearray
    storage: bool
    deadline_s: float
    groups_running: int = 0
    reason: Outcome = Outcome.FINE


@dataclass(frozen=True, eq=False)
class _AskedTier:
    """A tier, and what a find says of a page that it has."""

    tier: Tier
    reads: Lanes
    writeback: WriteBack
    place: int


class Finds:
    """All finds that wait for storage."""

    def __init__(self, parts: NodeParts, storing: Storing) -> None:
        self._slots = parts.slots
        self._clock = parts.clock
        self._writeback = storing.writeback
        self._far: _AskedTier | None = None
        if parts.far is not None and storing.far is not None:
            self._far = _AskedTier(parts.far.tier, parts.far.reads, storing.far, p.IN_FAR)
        near_place, self._all = (p.IN_NEAR, p.IN_NEAR | p.IN_FAR) if self._far else (0, 0)
        self._near = _AskedTier(parts.tier, parts.reads, storing.writeback, near_place)
        self._on_met = storing.met
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
            namespace=namespace,
            keys=keys,
            places=bytearray(self._place(key, is_sure=message.storage) for key in keys),
            storage=message.storage,
            deadline_s=self._clock() + message.timeout_ms / 1000,
        )
        self._open[connection, message.id] = job
        enough = p.QUEUED if message.storage else p.IN_STORAGE | p.IN_MEMORY
        unknown = [i for i, place in enumerate(job.places) if not place & enough]
        if not message.storage:
            self._on_met(connection, namespace, keys, [None] * len(keys))
        self._ask_storage(job, unknown, self._near)
        if self._far is not None and message.storage:
            self._ask_storage(job, unknown, self._far)
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
                job.reason = Outcome.TIMEOUT
                job.groups_running = 0
                self._answer_if_settled(job)

    def _place(self, key: Key, *, is_sure: bool) -> int:
        """What is known at once; with `is_sure` nothing that may not be true any more."""
        slot = self._slots.find(key)
        place = p.IN_MEMORY if slot is not None and slot.state is SlotState.READY else 0
        state = self._writeback.state(key)
        is_queued_far = self._far is not None and self._far.writeback.state(key) is Saving.QUEUED
        if state is Saving.QUEUED:
            place |= p.QUEUED
        elif is_queued_far and is_sure:
            place |= p.QUEUED | (p.IN_NEAR if state is Saving.SAVED else 0)
        elif state is Saving.SAVED and not is_sure:
            place |= p.IN_STORAGE
        return place

    def _ask_storage(self, job: FindJob, unknown: list[int], of: _AskedTier) -> None:
        groups: list[tuple[LanePool, list[int]]] = []
        for pool, blocks in of.reads.split(unknown, lambda i: job.keys[i]):
            if pool.stalled:
                job.reason = Outcome.TIMEOUT
                continue
            most = 1 if of.tier.is_by_request else _MAX_GROUP
            size = min(most, -(-len(blocks) // pool.num_threads))
            groups += [(pool, blocks[i : i + size]) for i in range(0, len(blocks), size)]
        job.groups_running += len(groups)
        for pool, group in groups:
            pool.submit(
                partial(
                    held_of if job.storage else _stored_of,
                    of.tier,
                    job.namespace.tier,
                    [job.keys[i] for i in group],
                ),
                partial(self._on_asked, job, group, of),
            )

    def _on_asked(self, job: FindJob, group: list[int], of: _AskedTier, result: object) -> None:
        if self._open.get((job.connection, job.id)) is not job:
            return
        job.groups_running -= 1
        if isinstance(result, list):
            missing = [i for i, is_stored in zip(group, result, strict=True) if not is_stored]
            for i, is_stored in zip(group, result, strict=True):
                self._on_told(job, i, of, is_stored=is_stored)
        else:
            missing = group
            job.reason = error_reason(result)
        if of is self._near and self._far is not None and not job.storage:
            self._ask_storage(job, missing, self._far)
        self._answer_if_settled(job)

    def _on_told(self, job: FindJob, i: int, of: _AskedTier, *, is_stored: bool) -> None:
        key = job.keys[i]
        if is_stored:
            of.writeback.note_stored(key)
            job.places[i] |= of.place if job.storage else 0
            if not job.storage or job.places[i] & self._all == self._all:
                job.places[i] |= p.IN_STORAGE
            return
        of.writeback.note_gone(key)
        if job.storage:
            # It may be in memory still.
            self._on_met(job.connection, job.namespace, [key], [None])
            job.places[i] |= self._place(key, is_sure=True)

    def _answer_if_settled(self, job: FindJob) -> None:
        if job.groups_running == 0 and self._open.pop((job.connection, job.id), None) is job:
            job.connection.asked.end(p.Find, job.id)
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
