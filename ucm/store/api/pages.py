"""Pages in the node cache's memory, and the user's memory for their shards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ucm.errors import TaskFailed
from ucm.store.api.buffers import Row
from ucm.store.blocks.keys import Key
from ucm.store.client.connection import NodeClient
from ucm.store.node.memory import MappedMemory

_MAP_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """One shard of one block, and the user's memory for it."""

    block_id: bytes
    key: Key
    shard: int
    row: Row


def by_key(parts: Iterable[Part]) -> dict[Key, list[Part]]:
    found: dict[Key, list[Part]] = {}
    for part in parts:
        found.setdefault(part.key, []).append(part)
    return found


class Pages:
    """The memory of the node cache of now, in this process. Owned by the store's thread, but for
    `capacity_bytes`, which is 0 until a node cache has been met."""

    def __init__(self, *, shard_bytes: int) -> None:
        self.capacity_bytes = 0
        self._shard_bytes = shard_bytes
        self._memory: MappedMemory | None = None
        self._mapped: set[int] = set()

    def map(self, connection: NodeClient) -> None:
        self.unmap()
        self.capacity_bytes = connection.welcome.capacity_bytes
        self._memory = MappedMemory(connection.memory_fd, self.capacity_bytes)

    def unmap(self) -> None:
        self._memory = None
        self._mapped.clear()

    def shard_address(self, offset: int, shard: int) -> int:
        """Where a shard of the page at `offset` lies in this process."""
        assert self._memory is not None
        start = offset + shard * self._shard_bytes
        end = start + self._shard_bytes
        for part in range(start // _MAP_BYTES, -(-end // _MAP_BYTES)):
            if part not in self._mapped:
                # Many page-table entries in one call: a fault for each would halve the first copy.
                self._mapped.add(part)
                nbytes = min(_MAP_BYTES, self.capacity_bytes - part * _MAP_BYTES)
                self._memory.populate(part * _MAP_BYTES, nbytes)
        return self._memory.address + start


def copy_failed(error: Exception) -> TaskFailed:
    """What a device reports ends the task, not the store."""
    return TaskFailed(f"a copy failed: {type(error).__name__}: {error}")
