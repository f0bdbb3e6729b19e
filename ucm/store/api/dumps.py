"""Dumps, as steps: the user's memory into pages, which become visible as wholes.

    a batch   reserve ──► copy the shards ──► commit those that are complete now
    at last   verify: all blocks that had no shard missing can be read on this node

Only one dump of a store reserves at a time, so that two with shards of one block don't take each
other for strangers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from ucm.errors import TaskFailed
from ucm.store.api.open_blocks import OpenBlock, OpenBlocks
from ucm.store.api.pages import Pages, Part, by_key, copy_failed
from ucm.store.api.questions import Questions, abort, batches, commit
from ucm.store.api.steps import (
    RETRY_S,
    Ask,
    Hear,
    NodeLost,
    Pause,
    ReserveTurn,
    Steps,
    Tell,
    TurnOver,
)
from ucm.store.api.unsaved import Unsaved
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p


@dataclass(frozen=True)
class Shared:
    """What the dumps of one store share."""

    pages: Pages
    blocks: OpenBlocks
    unsaved: Unsaved


def dump(questions: Questions, parts: Sequence[Part], *, batch: int, shared: Shared) -> Steps[None]:
    """The user's memory into pages."""
    yield from _ShardDump(questions, by_key(parts), batch, shared).steps()


class _ShardDump:
    def __init__(
        self, questions: Questions, parts: dict[Key, list[Part]], batch: int, shared: Shared
    ) -> None:
        self._questions = questions
        self._parts = parts
        self._shared = shared
        self._blocks = shared.blocks
        self._todo = deque(batches(list(parts), batch))
        # Blocks that the node cache said it has.
        self._unverified: list[Key] = []

    def steps(self) -> Steps[None]:
        has_turn = False
        while not has_turn:
            with suppress(NodeLost):  # nothing has been done yet
                yield ReserveTurn()
                has_turn = True
        try:
            yield from self._dump()
        except NodeLost as lost:
            raise TaskFailed(
                "the node cache was lost during the dump; dump the blocks again"
            ) from lost

    def _dump(self) -> Steps[None]:
        while True:
            while self._todo:
                yield ReserveTurn()
                no_room = yield from self._reserve_and_copy(self._todo.popleft())
                yield TurnOver()
                if no_room:
                    self._todo.appendleft(no_room)
                    waits_for = "room in the node cache: storage is slow, or the cache is small"
                    yield Pause(RETRY_S, waits_for)
            absent = yield from self._verify()
            if not absent:
                return
            # Whole blocks are dumped once more, in case the other one has given up.
            again = [key for key in absent if self._has_all_shards(key)]
            self._unverified = [key for key in absent if not self._has_all_shards(key)]
            self._todo.extend([again] if again else [])
            yield Pause(RETRY_S)

    def _reserve_and_copy(self, batch: list[Key]) -> Steps[list[Key]]:
        """Returns the blocks that there is no room for."""
        for key in batch:
            block = self._blocks.get(key)
            if block is not None and block.broken:
                self._start_over(key, block)
        missing = [key for key in batch if key not in self._blocks]
        if missing:
            yield Ask(self._questions.reserve(missing), undo=partial(give_back, missing))
            reply: p.ReserveReply = yield Hear()
            now_s = time.monotonic()
            for key, offset in zip(missing, reply.offsets, strict=True):
                if offset != p.NO_ROOM:
                    self._blocks[key] = OpenBlock(None if offset == p.HAVE else offset, now_s)
        no_room = [key for key in missing if key not in self._blocks]
        yield from self._copy([key for key in batch if key in self._blocks])
        return no_room

    def _start_over(self, key: Key, block: OpenBlock) -> None:
        """Dumping a shard a second time is how a caller asks for it."""
        parts = self._parts[key]
        if not any(part.shard in block.copied for part in parts):
            name = parts[0].block_id.hex()
            raise TaskFailed(f"block {name} can't be completed: {block.broken}; dump all of it")
        del self._blocks[key]

    def _copy(self, keys: list[Key]) -> Steps[None]:
        """This task's shards of open blocks. Commits the complete ones, also if a copy fails."""
        complete: list[Key] = []
        failed: TaskFailed | None = None
        try:
            complete.extend(key for key in keys if self._copy_block(key))
        except Exception as error:  # noqa: BLE001 (it is raised below)
            failed = copy_failed(error)
        offsets = {key: self._blocks.pop(key).offset for key in complete}
        self._unverified += [key for key, offset in offsets.items() if offset is None]
        # First: what storage says of them comes after the commit.
        self._shared.unsaved.note({key: self._parts[key][0].block_id for key in complete})
        filled = [key for key, offset in offsets.items() if offset is not None]
        if filled:
            yield Tell(commit(filled))
        if failed is not None:
            raise failed

    def _copy_block(self, key: Key) -> bool:
        """Whether it has all of its shards now."""
        block = self._blocks[key]
        block.touched_s = time.monotonic()
        for part in self._parts[key]:
            if block.offset is not None:
                part.row.dump_to(self._shared.pages.shard_address(block.offset, part.shard))
            block.copied.add(part.shard)
        return len(block.copied) == self._blocks.num_shards

    def _verify(self) -> Steps[list[Key]]:
        """Those that are not there after all. The answer comes after the commits were acted on; and
        the blocks that the node cache said it has may have been another client's, not complete
        yet."""
        yield Ask(self._questions.find(self._unverified))
        waits_for = "another client, which is dumping the same block"
        found: p.Found = yield Hear(waits_for)
        places = zip(self._unverified, found.places, strict=True)
        return [key for key, place in places if not place]

    def _has_all_shards(self, key: Key) -> bool:
        return len({part.shard for part in self._parts[key]}) == self._blocks.num_shards


def give_back(keys: Sequence[Key], reply: p.ReserveReply) -> p.Abort | None:
    """The slots of a reply that nobody waits for any more."""
    reserved = [key for key, offset in zip(keys, reply.offsets, strict=True) if offset >= 0]
    return abort(reserved) if reserved else None
