"""Dumps: the user's memory into pages, which become visible as wholes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from ucm.errors import TaskFailed
from ucm.store.api.tasks import RETRY_S, Part, Task, batches
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p

if TYPE_CHECKING:
    from ucm.store.api.driver import Transfers

_NAMED = 5


@dataclass(slots=True)
class OpenBlock:
    """A block of which some shards were dumped. `offset` is None when the node cache has the block
    already, so that its shards go nowhere. `broken` says why the block can't be completed."""

    offset: int | None
    touched_s: float
    copied: set[int] = field(default_factory=set)
    broken: str = ""


@dataclass(eq=False, slots=True)
class Dumped:
    """One dump of a block, to be told from the next. `refused` says why storage did not take it."""

    block_id: bytes
    refused: str = ""


def not_written(blocks: Sequence[Dumped]) -> str:
    """Names the first few."""
    named = [
        f"{dumped.block_id.hex()} ({dumped.refused or 'not there'})" for dumped in blocks[:_NAMED]
    ]
    more = f" and {len(blocks) - _NAMED} more" if len(blocks) > _NAMED else ""
    return f"{len(blocks)} blocks are not in storage: {', '.join(named)}{more}"


class DumpTask(Task):
    """The user's memory into pages: slots are reserved and filled chunk by chunk, and each block
    is committed with its last shard. Only one dump of a store reserves at a time (`on_turn`), so
    that two tasks with shards of one block don't take each other for strangers."""

    def __init__(self, parts: Sequence[Part], *, batch: int, num_shards: int) -> None:
        super().__init__()
        self._parts: dict[Key, list[Part]] = {}
        for part in parts:
            self._parts.setdefault(part.key, []).append(part)
        self._num_shards = num_shards
        self._todo = deque(batches(list(self._parts), batch))
        self._to_verify: list[Key] = []
        self._has_begun = False

    def begin(self, node: Transfers) -> None:
        if self._has_begun:
            self.fail(TaskFailed("the node cache was lost during the dump; dump the blocks again"))
        else:
            node.want_turn(self)

    def _release(self) -> None:
        self._parts.clear()

    def on_turn(self, node: Transfers) -> None:
        self._has_begun = True
        if not self._todo:
            node.end_turn()
            self._verify(node)
            return
        chunk = self._todo.popleft()
        for key in chunk:
            if not self._can_go_on(node, key):
                node.end_turn()
                return
        missing = [key for key in chunk if key not in node.blocks]
        if not missing:
            self._copy(node, chunk)
            return
        node.ask(
            lambda number: p.Reserve(
                id=number,
                ns=node.NAMESPACE,
                keys=list(missing),
                # Block ids don't say what precedes a block: each is written for itself.
                parents=[b""] * len(missing),
                will_ask_again=True,
            ),
            partial(self._on_reserved, node, chunk, missing),
        )

    def _can_go_on(self, node: Transfers, key: Key) -> bool:
        """Whether the block can take this task's shards. Dumping a shard a second time is how a
        caller starts a block over."""
        block = node.blocks.get(key)
        if block is None or not block.broken:
            return True
        if any(part.shard in block.copied for part in self._parts[key]):
            del node.blocks[key]
            return True
        name = self._parts[key][0].block_id.hex()
        self.fail(TaskFailed(f"block {name} can't be completed: {block.broken}; dump all of it"))
        return False

    def _on_reserved(
        self, node: Transfers, chunk: list[Key], missing: list[Key], reply: p.ReserveReply
    ) -> None:
        now_s = time.monotonic()
        for key, offset in zip(missing, reply.offsets, strict=True):
            if offset != p.NO_ROOM:
                block = OpenBlock(None if offset == p.HAVE else offset, now_s)
                node.blocks[key] = block
        if self.has_ended:
            node.give_up([key for key in missing if key in node.blocks])
            node.end_turn()
            return
        refused = [key for key in chunk if key not in node.blocks]
        if refused:
            self.waits_for = "room in the node cache: storage is slow, or the cache is small"
            self._todo.appendleft(refused)
        self._copy(node, [key for key in chunk if key in node.blocks], pause=bool(refused))

    def _copy(self, node: Transfers, keys: list[Key], *, pause: bool = False) -> None:
        """Copies this task's shards of open blocks, commits those that are complete, and lets
        others have their turn."""
        complete: list[Key] = []
        try:
            complete.extend(key for key in keys if self._copy_block(node, key))
        except Exception as error:  # noqa: BLE001 (what a device reports ends the task, not the store)
            self.fail(TaskFailed(f"a copy failed: {type(error).__name__}: {error}"))
        offsets = {key: node.blocks.pop(key).offset for key in complete}
        self._to_verify += [key for key, offset in offsets.items() if offset is None]
        # First: what storage says of them comes after the commit.
        node.note_dumped([(key, self._parts[key][0].block_id) for key in complete])
        node.commit([key for key, offset in offsets.items() if offset is not None])
        node.end_turn()
        if pause:
            node.later(RETRY_S, partial(self._take_another_turn, node))
        else:
            self._take_another_turn(node)

    def _copy_block(self, node: Transfers, key: Key) -> bool:
        block = node.blocks[key]
        block.touched_s = time.monotonic()
        for part in self._parts[key]:
            if block.offset is not None:
                part.row.dump_to(node.shard_address(block.offset, part.shard))
            block.copied.add(part.shard)
        return len(block.copied) == self._num_shards

    def _take_another_turn(self, node: Transfers) -> None:
        if not self.has_ended:
            node.want_turn(self)

    def _verify(self, node: Transfers) -> None:
        """The answer comes after the commits were acted on; and the blocks that the node cache said
        it has may have been another client's, not complete yet."""
        self.waits_for = "another client, which is dumping the same block"
        self._find(node, self._to_verify, partial(self._on_verified, node))

    def _on_verified(self, node: Transfers, found: p.Found) -> None:
        if self.has_ended:
            return
        absent = [k for k, place in zip(self._to_verify, found.places, strict=True) if not place]
        if not absent:
            self.finish()
            return
        # Whole blocks are dumped once more, in case the other one has given up.
        again = [
            key
            for key in absent
            if len({part.shard for part in self._parts[key]}) == self._num_shards
        ]
        self._to_verify = [key for key in absent if key not in set(again)]
        if again:
            self._todo.append(again)
        node.later(RETRY_S, partial(self._take_another_turn, node))
