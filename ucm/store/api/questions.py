"""What tasks of the store API say to the node cache, and how much they ask for at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p

_T = TypeVar("_T")

# A store has one.
NAMESPACE: Final = 1
# What is asked for at once: enough to hide the way to the node cache, little enough that a copy
# starts while the next pages are still being read.
_BATCH_BYTES: Final = 64 << 20
_MAX_BATCH_BLOCKS: Final = 256
# The node cache answers earlier than the task ends, so that its reason is heard, on a machine that
# has much to do as well: by this part of the time that is left, within these bounds.
_ANSWER_PART: Final = 1 / 8
_LEAST_ANSWER_S: Final = 0.1
_MOST_ANSWER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Questions:
    """Of one task, which ends at `deadline_s` (time.monotonic())."""

    next_id: Callable[[], int]
    deadline_s: float

    def find(self, keys: Sequence[Key], *, storage: bool = False) -> p.Find:
        """Where are these blocks?"""
        return p.Find(
            id=self.next_id(),
            ns=NAMESPACE,
            keys=list(keys),
            storage=storage,
            timeout_ms=self._timeout_ms(),
        )

    def lookup(self, keys: Sequence[Key], *, promised: int = 0) -> p.Lookup:
        """The pages of these blocks, pinned, up to the first that can't be had. The first
        `promised` are waited for."""
        return p.Lookup(
            id=self.next_id(),
            ns=NAMESPACE,
            keys=list(keys),
            read_from=0,
            load=True,
            timeout_ms=self._timeout_ms(),
            promised=promised,
        )

    def reserve(self, keys: Sequence[Key], parents: Sequence[bytes] = ()) -> p.Reserve:
        """Without `parents` each is written for itself."""
        return p.Reserve(
            id=self.next_id(),
            ns=NAMESPACE,
            keys=list(keys),
            parents=list(parents) or no_parents(keys),
            will_ask_again=True,
        )

    def _timeout_ms(self) -> int:
        left_s = self.deadline_s - time.monotonic()
        answer_s = min(_MOST_ANSWER_S, max(_LEAST_ANSWER_S, left_s * _ANSWER_PART))
        return max(1, int((left_s - answer_s) * 1000))


def commit(keys: Sequence[Key], parents: Sequence[bytes] = ()) -> p.Commit:
    """Without `parents` each is written for itself."""
    return p.Commit(ns=NAMESPACE, keys=list(keys), parents=list(parents) or no_parents(keys))


def abort(keys: Sequence[Key]) -> p.Abort:
    return p.Abort(ns=NAMESPACE, keys=list(keys))


def no_parents(keys: Sequence[Key]) -> list[bytes]:
    """Block ids don't say what precedes a block: each is written for itself."""
    return [b""] * len(keys)


def batch_blocks(page_bytes: int, capacity_bytes: int) -> int:
    """How many blocks to ask for at once, of a node cache of this size."""
    batch_bytes = min(_BATCH_BYTES, capacity_bytes // 4)
    return min(_MAX_BATCH_BLOCKS, max(1, batch_bytes // page_bytes))


def batches(each: list[_T], size: int) -> list[list[_T]]:
    return [each[i : i + size] for i in range(0, len(each), size)]
