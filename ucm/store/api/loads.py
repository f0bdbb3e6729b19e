"""Loads: pages into the user's memory, or only into the node cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from ucm.errors import TaskFailed
from ucm.outcome import Outcome
from ucm.store.api.tasks import RETRY_S, Part, Task, batches
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p

if TYPE_CHECKING:
    from ucm.store.api.driver import Transfers

_BATCHES_AHEAD = 2

_WHY_ABSENT = {
    Outcome.NEVER_STORED: "it is not in the store",
    Outcome.BEING_COMPUTED_HERE: "not all of its shards were dumped",
    Outcome.CORRUPT: "its file is damaged, or is none",
    Outcome.IO_ERROR: "storage failed",
    Outcome.TIMEOUT: "storage did not answer in time",
}


class LoadTask(Task):
    """Pages into the user's memory: asked for in batches, copied as each arrives. Blocks without
    parts are only brought into the node cache."""

    def __init__(self, parts: Sequence[Part], *, batch: int, keys: Sequence[Key] = ()) -> None:
        super().__init__()
        self._parts: dict[Key, list[Part]] = {key: [] for key in keys}
        for part in parts:
            self._parts.setdefault(part.key, []).append(part)
        self._todo = deque(batches(list(self._parts), batch))
        self._asked: dict[int, list[Key]] = {}
        self._is_paused = False

    def begin(self, node: Transfers) -> None:
        self._todo.extendleft(reversed(self._asked.values()))
        self._asked.clear()
        self._go_on(node)

    def _release(self) -> None:
        self._parts.clear()

    def _go_on(self, node: Transfers) -> None:
        self._is_paused = False
        while self._todo and len(self._asked) < _BATCHES_AHEAD and not self._is_paused:
            self._ask(node, self._todo.popleft())
        if not self._todo and not self._asked:
            self.finish()

    def _ask(self, node: Transfers, batch: list[Key]) -> None:
        self.waits_for = "storage"
        number = node.ask(
            lambda number: p.Lookup(
                id=number,
                ns=node.NAMESPACE,
                keys=list(batch),
                read_from=0,
                load=True,
                timeout_ms=self._timeout_ms(),
            ),
            partial(self._on_reply, node),
        )
        self._asked[number] = batch

    def _on_reply(self, node: Transfers, reply: p.LookupReply) -> None:
        if self.has_ended:
            node.send(p.Release(lookups=[reply.id]))
            return
        batch = self._asked.pop(reply.id)
        try:
            for key, offset in zip(batch, reply.offsets, strict=False):
                for part in self._parts[key]:
                    part.row.load_from(node.shard_address(offset, part.shard))
        except Exception as error:  # noqa: BLE001 (what a device reports ends the task, not the store)
            self.fail(TaskFailed(f"a copy failed: {type(error).__name__}: {error}"))
            return
        finally:
            node.send(p.Release(lookups=[reply.id]))
        rest = batch[len(reply.offsets) :]
        if not rest:
            self._continue(node)
        elif reply.reason == Outcome.NO_ROOM:
            self.waits_for = "room in the node cache: raise cache_buffer_capacity_gb"
            self._todo.appendleft(rest)
            self._is_paused = True
            node.later(RETRY_S, partial(self._continue, node))
        else:
            why = _WHY_ABSENT.get(reply.reason, reply.reason)
            if reply.reason in (Outcome.CORRUPT, Outcome.IO_ERROR, Outcome.TIMEOUT):
                why += f"; the log of the node cache says more: {node.log_path}"
            self.fail(TaskFailed(f"{self._name(rest[0])} can't be loaded: {why}"))

    def _continue(self, node: Transfers) -> None:
        if not self.has_ended:
            self._go_on(node)

    def _name(self, key: Key) -> str:
        parts = self._parts[key]
        return f"block {parts[0].block_id.hex()}" if parts else f"block with key {key.hex()}"


class PrefetchTask(Task):
    """Brings what storage has, and memory lacks, into the node cache."""

    def __init__(self, keys: Sequence[Key], *, batch: int, max_blocks: int) -> None:
        super().__init__()
        self._keys = list(dict.fromkeys(keys))
        self._batch = batch
        self._max_blocks = max_blocks

    def begin(self, node: Transfers) -> None:
        self._find(node, self._keys, partial(self._on_found, node))

    def _on_found(self, node: Transfers, found: p.Found) -> None:
        stored = [
            key
            for key, place in zip(self._keys, found.places, strict=True)
            if place & p.IN_STORAGE and not place & p.IN_MEMORY
        ]
        self.finish()
        if stored:
            node.start(LoadTask([], batch=self._batch, keys=stored[: self._max_blocks]))
