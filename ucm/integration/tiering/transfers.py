"""What jobs of vLLM's tiering do, as steps (`ucm/store/api/steps.py`): rows into pages and back.

    store   reserve ──► copy ──► commit, each row behind the one before it in the prompt
    load    look up ──► copy ──► release; what can't be had is left out
    await   look up what is promised, which brings it into the node cache as it comes

A job notes which rows it has done as it goes, so one that ends too late has done those.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Final

from ucm.outcome import Outcome
from ucm.store.api.dumps import give_back
from ucm.store.api.loads import Absent, bring
from ucm.store.api.pages import Pages
from ucm.store.api.questions import Questions, batch_blocks, batches, commit
from ucm.store.api.steps import RETRY_S, Ask, Hear, NodeLost, Pause, Steps, Tell
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p

_ROOM: Final = "room in the node cache: storage is slow, or cache_buffer_capacity_gb too small"
_OTHER_CLIENT: Final = "another client, which is storing the same row"


@dataclass(frozen=True, slots=True)
class PlacedRow:
    """`parent` precedes it in the prompt; empty for none."""

    key: Key
    address: int
    parent: bytes = b""


@dataclass
class RowJob:
    """`done` grows while the steps run, on the store's thread; read it when they have ended.
    `reasons` says of what is not done why."""

    rows: Sequence[PlacedRow]
    done: set[Key] = field(default_factory=set)
    reasons: dict[Key, Outcome] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        return len(self.done) == len({row.key for row in self.rows})


def store(questions: Questions, job: RowJob, *, pages: Pages, row_bytes: int) -> Steps[None]:
    """Rows that the node cache has already are not copied. It may have been told of them by another
    client, which has not filled them yet and may never: then they are stored after all."""
    todo = list(job.rows)
    while todo:
        try:
            todo = yield from _store_once(questions, todo, job, pages, row_bytes)
        except NodeLost:
            todo = [row for row in todo if row.key not in job.done]
            continue
        if todo:
            with suppress(NodeLost):
                yield Pause(RETRY_S)


def _store_once(
    questions: Questions, todo: list[PlacedRow], job: RowJob, pages: Pages, row_bytes: int
) -> Steps[list[PlacedRow]]:
    """Returns the rows that are to be tried again."""
    left: list[PlacedRow] = []
    elsewhere: list[PlacedRow] = []
    waiting = deque(batches(todo, batch_blocks(row_bytes, pages.capacity_bytes)))
    while waiting:
        batch = waiting.popleft()
        keys = [row.key for row in batch]
        parents = [row.parent for row in batch]
        yield Ask(questions.reserve(keys, parents), undo=partial(give_back, keys))
        reply: p.ReserveReply = yield Hear(_ROOM)
        filled = []
        for row, offset in zip(batch, reply.offsets, strict=True):
            if offset >= 0:
                ctypes.memmove(pages.shard_address(offset, 0), row.address, row_bytes)
                filled.append(row)
            else:
                (elsewhere if offset == p.HAVE else left).append(row)
        if filled:
            yield Tell(commit([row.key for row in filled], [row.parent for row in filled]))
            job.done.update(row.key for row in filled)
        if left:
            return [*left, *elsewhere, *chain.from_iterable(waiting)]
    if elsewhere:
        yield Ask(questions.find([row.key for row in elsewhere]))
        found: p.Found = yield Hear(_OTHER_CLIENT)
        for row, place in zip(elsewhere, found.places, strict=True):
            if place:
                job.done.add(row.key)
            else:
                left.append(row)
    return left


def load(questions: Questions, job: RowJob, *, pages: Pages, row_bytes: int) -> Steps[None]:
    """Each row that can be had. Its page was verified in the read that has brought it."""
    addresses = {row.key: row.address for row in job.rows}

    def copy(batch: Sequence[Key], offsets: Sequence[int]) -> None:
        for key, offset in zip(batch, offsets, strict=False):
            ctypes.memmove(addresses[key], pages.shard_address(offset, 0), row_bytes)
            job.done.add(key)

    def leave_out(absent: Absent) -> None:
        job.reasons[absent.key] = absent.reason

    batch = batch_blocks(row_bytes, pages.capacity_bytes)
    yield from bring(questions, list(addresses), batch, copy, leave_out=leave_out)


def promised(questions: Questions, keys: Sequence[Key]) -> Steps[Outcome]:
    """Until all of `keys`, of one prompt in its order, are there, or the time is over. They stay in
    the node cache's memory for the load that follows, as long as there is room. Returns what has
    ended it; FINE is none."""
    while True:
        try:
            yield Ask(questions.lookup(keys, promised=len(keys)))
            reply: p.LookupReply = yield Hear("pages that prefill has promised")
            break
        except NodeLost:
            continue
    yield Tell(p.Release(lookups=[reply.id]))
    return reply.reason
