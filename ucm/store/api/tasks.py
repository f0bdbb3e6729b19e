"""What users of the store API have under way: a task is a handle for them, and a small state
machine that the store's thread drives.

A task ends once, well or badly, and then touches no memory of its user any more. `begin` is called
when there is a node cache, and again whenever that one was lost and another one is there: whatever
the task had asked is gone then, and it starts over or fails.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ucm.errors import UcmError
from ucm.outcome import Outcome
from ucm.store.api.buffers import Row
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p

if TYPE_CHECKING:
    from ucm.store.api.driver import Transfers

# How often a full node cache is asked again.
RETRY_S = 0.02
# What is asked for at once: enough to hide the way to the node cache, little enough that a copy
# starts while the next pages are still being read.
_BATCH_BYTES = 64 << 20
_MAX_BATCH_BLOCKS = 256
# The node cache answers a little earlier than the task ends, so that its reason is heard.
_ANSWER_S = 0.1


@dataclass(frozen=True, slots=True)
class Part:
    """One shard of one block, and the user's memory for it."""

    block_id: bytes
    key: Key
    shard: int
    row: Row


class Task:
    """A handle for `UcmPipelineStore.wait` and `check`."""

    def __init__(self) -> None:
        self.deadline_s = 0.0
        # What a task that times out was waiting for, for people.
        self.waits_for = "the node cache"
        self.on_end: Callable[[Task], None] = lambda task: None
        self._ended = threading.Event()
        self._error: UcmError | None = None

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Whether the task has ended by then. Raises what it failed with."""
        ended = self._ended.wait(timeout_s)
        if self._error is not None:
            raise self._error
        return ended

    # -- on the store's thread -------------------------------------------------------------

    def begin(self, node: Transfers) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        self._end(None)

    def fail(self, error: UcmError) -> None:
        self._end(error)

    def _end(self, error: UcmError | None) -> None:
        if not self.has_ended:
            self._error = error
            self._release()
            self.on_end(self)
            self._ended.set()

    def _release(self) -> None:
        """Lets go of the user's memory, which lives as long as the handle otherwise."""

    def _timeout_ms(self) -> int:
        return max(1, int((self.deadline_s - _ANSWER_S - time.monotonic()) * 1000))

    def _find(
        self,
        node: Transfers,
        keys: Sequence[Key],
        on_found: Callable[[p.Found], None],
        *,
        storage: bool = False,
    ) -> None:
        """Asks where these blocks are."""
        node.ask(
            lambda number: p.Find(
                id=number,
                ns=node.NAMESPACE,
                keys=list(keys),
                storage=storage,
                timeout_ms=self._timeout_ms(),
            ),
            on_found,
        )


class FindTask(Task):
    """Where are these blocks? `places` holds the answer."""

    def __init__(self, keys: Sequence[Key], *, storage: bool) -> None:
        super().__init__()
        self.places = b""
        self.reason = Outcome.FINE
        self._keys = list(keys)
        self._storage = storage

    def begin(self, node: Transfers) -> None:
        self.waits_for = "storage"
        self._find(node, self._keys, self._on_found, storage=self._storage)

    def _on_found(self, found: p.Found) -> None:
        self.places, self.reason = found.places, found.reason
        self.finish()


def batch_blocks(page_bytes: int, capacity_bytes: int) -> int:
    """How many blocks to ask for at once, of a node cache of this size."""
    batch_bytes = min(_BATCH_BYTES, capacity_bytes // 4)
    return min(_MAX_BATCH_BLOCKS, max(1, batch_bytes // page_bytes))


def batches(keys: list[Key], size: int) -> list[list[Key]]:
    return [keys[i : i + size] for i in range(0, len(keys), size)]
