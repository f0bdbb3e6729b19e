"""Blocks of which a store has dumped some shards, and not all: they become visible as wholes."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from ucm.store.blocks.keys import Key

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class OpenBlock:
    """`offset` is None when the node cache has the block already, so that its shards go nowhere.
    `broken` says why the block can't be completed."""

    offset: int | None
    touched_s: float
    copied: set[int] = field(default_factory=set)
    broken: str = ""


class OpenBlocks(dict[Key, OpenBlock]):
    """Those of one store. Owned by its thread."""

    def __init__(self, *, num_shards: int, timeout_s: float) -> None:
        """A block is given up `timeout_s` after the last of its shards."""
        super().__init__()
        self.num_shards = num_shards
        self._timeout_s = timeout_s

    def node_lost(self) -> None:
        for block in self.values():
            block.broken = block.broken or "the node cache was lost, and earlier shards with it"

    def expire(self) -> list[Key]:
        """Gives up what was begun too long ago. Returns those whose slots are to be given back."""
        now_s = time.monotonic()
        late = [
            (key, block)
            for key, block in self.items()
            if now_s - block.touched_s >= self._timeout_s
        ]
        reserved = []
        for key, block in late:
            if block.broken:
                del self[key]
                continue
            logger.warning(
                "gave up a block of which only %d of %d shards were dumped within %g s",
                len(block.copied),
                self.num_shards,
                self._timeout_s,
            )
            if block.offset is not None:
                reserved.append(key)
            block.broken = "its other shards were dumped too long ago"
            block.offset = None
            block.touched_s = now_s
        return reserved
