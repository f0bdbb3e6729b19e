"""Finds and loads, as steps: where blocks are, and their pages into the user's memory, or only into
the node cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from ucm.errors import TaskFailed
from ucm.outcome import Outcome
from ucm.store.api.pages import Pages, Part, by_key, copy_failed
from ucm.store.api.questions import Questions, batches
from ucm.store.api.steps import RETRY_S, Ask, Hear, NodeLost, Pause, Steps, Tell
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p

_BATCHES_AHEAD: Final = 2
_WHY_ABSENT: Final = {
    Outcome.NEVER_STORED: "it is not in the store",
    Outcome.BEING_COMPUTED_HERE: "not all of its shards were dumped",
    Outcome.CORRUPT: "its file is damaged, or is none",
    Outcome.IO_ERROR: "storage failed",
    Outcome.TIMEOUT: "storage did not answer in time",
}
_LOGGED: Final = (Outcome.CORRUPT, Outcome.IO_ERROR, Outcome.TIMEOUT)


def find(questions: Questions, keys: Sequence[Key], *, storage: bool) -> Steps[p.Found]:
    """Where are these blocks?"""
    found: p.Found | None = None
    while found is None:
        with suppress(NodeLost):
            yield Ask(questions.find(keys, storage=storage))
            found = yield Hear("storage")
    return found


def prefetch(
    questions: Questions, keys: Sequence[Key], *, batch: int, max_blocks: int
) -> Steps[None]:
    """What storage has, and memory lacks, into the node cache. Nobody hears of its end."""
    keys = list(dict.fromkeys(keys))
    found = yield from find(questions, keys, storage=False)
    stored = [
        key
        for key, place in zip(keys, found.places, strict=True)
        if place & p.IN_STORAGE and not place & p.IN_MEMORY
    ]
    yield from bring(questions, stored[:max_blocks], batch, lambda batch, offsets: None)


def load(
    questions: Questions, parts: Sequence[Part], *, batch: int, pages: Pages, log_path: str
) -> Steps[None]:
    """Pages into the user's memory. `log_path` is the node cache's, for people."""
    parts_of = by_key(parts)

    def copy(batch: Sequence[Key], offsets: Sequence[int]) -> None:
        for key, offset in zip(batch, offsets, strict=False):
            for part in parts_of[key]:
                part.row.load_from(pages.shard_address(offset, part.shard))

    absent = yield from bring(questions, list(parts_of), batch, copy)
    if absent is not None:
        name = f"block {parts_of[absent.key][0].block_id.hex()}"
        why = _WHY_ABSENT.get(absent.reason, str(absent.reason))
        if absent.reason in _LOGGED:
            why += f"; the log of the node cache says more: {log_path}"
        raise TaskFailed(f"{name} can't be loaded: {why}")


@dataclass(frozen=True, slots=True)
class Absent:
    """A block that can't be had, and why."""

    key: Key
    reason: Outcome


def bring(
    questions: Questions,
    keys: list[Key],
    batch_size: int,
    copy: Callable[[Sequence[Key], Sequence[int]], None],
    *,
    leave_out: Callable[[Absent], None] | None = None,
) -> Steps[Absent | None]:
    """Asks for the pages in batches, some ahead, and copies each batch as it comes. Returns the
    first block that can't be had, or tells each to `leave_out` and goes on."""
    todo = deque(batches(keys, batch_size))
    asked: dict[int, list[Key]] = {}
    waits_for = "storage"
    is_full = False
    while todo or asked:
        try:
            if is_full and not asked:
                yield Pause(RETRY_S, waits_for)
                is_full = False
            while todo and len(asked) < _BATCHES_AHEAD and not is_full:
                waits_for = "storage"
                number = yield Ask(questions.lookup(todo[0]))
                asked[number] = todo.popleft()
            reply: p.LookupReply = yield Hear(waits_for)
        except NodeLost:
            todo.extendleft(reversed(asked.values()))
            asked.clear()
            is_full = False
            continue
        batch = asked.pop(reply.id)
        try:
            copy(batch, reply.offsets)
        except Exception as error:
            yield Tell(p.Release(lookups=[reply.id]))
            raise copy_failed(error) from error
        yield Tell(p.Release(lookups=[reply.id]))
        rest = batch[len(reply.offsets) :]
        is_full = bool(rest) and reply.reason is Outcome.NO_ROOM
        if is_full:
            waits_for = "room in the node cache: raise cache_buffer_capacity_gb"
            todo.appendleft(rest)
        elif rest:
            absent = Absent(rest[0], reply.reason)
            if leave_out is None:
                return absent
            leave_out(absent)
            if rest[1:]:
                todo.appendleft(rest[1:])
    return None
