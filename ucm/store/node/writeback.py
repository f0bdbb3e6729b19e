"""Write-back: committed pages go to the tier, visible in prompt order.

A block's file is published only after the file of the block before it, so on storage the last
block of a prompt stands for all of them. Pages are staged (written under a temporary name) in
parallel and published one after the other:

    queued ──staged──► staged ──parent published──► publishing ──► stored
       └──────── failed: so does every block after it in the prompt

The queue is bounded by `max_pages`; what doesn't fit is dropped and counted. A page in the queue
is pinned, so its slot can't be reused before its bytes are out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from ucm.errors import TierError
from ucm.store.keys import Key, num_tokens_of
from ucm.store.node.io import Pool
from ucm.store.node.notices import Notices
from ucm.store.node.state import OpenedNamespace
from ucm.store.slots import Slot, SlotState, SlotTable
from ucm.store.tier import Staged, Tier

_REMEMBERED_KEYS = 1 << 16
# How long "this node cache has seen the file" saves asking storage again before a dump.
_REMEMBERED_S = 60.0
_V = TypeVar("_V")


@dataclass(eq=False, slots=True)
class _Write:
    key: Key
    parent: Key | None
    slot: Slot
    staged: Staged | None = None
    is_staged: bool = False
    doomed: bool = False
    after: list[_Write] = field(default_factory=list)


class WriteBack:
    """Owned by the event loop's thread, like the slot table it pins in."""

    def __init__(
        self,
        *,
        tier: Tier,
        pool: Pool,
        slots: SlotTable,
        page_of: Callable[[Slot], memoryview],
        count: Callable[[str], None],
        max_pages: int,
        clock: Callable[[], float],
        notices: Notices | None = None,
    ) -> None:
        self._tier = tier
        self._pool = pool
        self._slots = slots
        self._page_of = page_of
        self._count = count
        self._notices = notices or Notices(clock)
        self._max_pages = max_pages
        self._clock = clock
        self._writes: dict[Key, _Write] = {}
        # Writes whose parent's slot is still being filled: nothing to queue behind yet.
        self._waiting: dict[Key, list[_Write]] = {}
        self._failed: OrderedDict[Key, None] = OrderedDict()
        self._stored_s: OrderedDict[Key, float] = OrderedDict()

    @property
    def depth(self) -> int:
        return len(self._writes)

    @property
    def is_full(self) -> bool:
        return len(self._writes) >= self._max_pages

    def was_stored(self, key: Key) -> bool:
        """Whether this node cache saw `key` in the tier a moment ago."""
        seen_s = self._stored_s.get(key)
        return seen_s is not None and self._clock() - seen_s <= _REMEMBERED_S

    def is_safe(self, key: Key) -> bool:
        """Stored a moment ago, or about to be."""
        return key in self._writes or self.was_stored(key)

    def note_stored(self, key: Key) -> None:
        self._failed.pop(key, None)
        _remember(self._stored_s, key, self._clock())

    def enqueue(self, namespace: OpenedNamespace, key: Key, parent: Key | None, slot: Slot) -> None:
        """Queues the READY page in `slot`. Drops it when the queue is full, or when the block
        before it was dropped: a file that nothing leads to would only fill the disk."""
        if key in self._writes:
            return
        waiting = self._waiting.pop(key, [])
        if parent is not None and parent in self._failed:
            self._drop(key, waiting, "dump_dropped_after_failed")
            return
        if self.is_full:
            self._drop(key, waiting, "dump_dropped_queue_full")
            return
        self._failed.pop(key, None)
        write = _Write(key, parent, slot, after=waiting)
        self._writes[key] = write
        self._slots.pin(slot)
        page = self._page_of(slot)
        self._pool.submit(
            partial(
                self._tier.stage,
                namespace.tier,
                key,
                page,
                num_tokens=num_tokens_of(key, block_tokens=namespace.block_tokens),
            ),
            partial(self._on_staged, write),
            on_overdue=partial(self._count, "write_overdue"),
        )

    def filling_ended(self, key: Key) -> None:
        """The slot of `key` was given up before it was READY: what waited for it is dropped."""
        for write in self._waiting.pop(key, []):
            self._fail(write, "dump_dropped_after_failed")

    def filled_from_tier(self, key: Key, *, is_hit: bool) -> None:
        """The slot of `key` was not filled by an engine but read: it is stored, or is not."""
        if not is_hit:
            self._stored_s.pop(key, None)
            self.filling_ended(key)
            return
        self.note_stored(key)
        for write in self._waiting.pop(key, []):
            self._publish_in_order(write)

    def _on_staged(self, write: _Write, result: object) -> None:
        if isinstance(result, TierError):
            self._fail_write(write, result)
            return
        write.is_staged = True
        write.staged = result if isinstance(result, Staged) else None
        if write.doomed:
            self._discard(write)
        elif write.staged is None:
            self._stored(write, "write_already_there")
        else:
            self._publish_in_order(write)

    def _publish_in_order(self, write: _Write) -> None:
        parent = write.parent
        if parent is not None:
            before = self._writes.get(parent)
            if before is not None:
                before.after.append(write)
                return
            if parent in self._failed:
                self._fail(write, "dump_dropped_after_failed")
                return
            filling = self._slots.find(parent)
            if filling is not None and filling.state is SlotState.FILLING:
                self._waiting.setdefault(parent, []).append(write)
                return
        staged = write.staged
        assert staged is not None
        self._pool.submit(
            partial(self._tier.publish, staged),
            partial(self._on_published, write),
            on_overdue=partial(self._count, "write_overdue"),
            # Before more staging: the head of a long prompt is to be had while its tail is written.
            urgent=True,
        )

    def _on_published(self, write: _Write, result: object) -> None:
        if isinstance(result, TierError):
            self._fail_write(write, result)
        else:
            write.staged = None
            self._stored(write, "write_done")

    def _stored(self, write: _Write, counter: str) -> None:
        self._count(counter)
        self.note_stored(write.key)
        self._finish(write)
        for after in write.after:
            self._publish_in_order(after)

    def _fail_write(self, write: _Write, error: TierError) -> None:
        counter = f"write_failed_{error.reason}"
        self._notices.warn(counter, error)
        self._fail(write, counter)

    def _fail(self, write: _Write, counter: str) -> None:
        """Drops `write` and everything that waits behind it. Iterative: a prompt may be long."""
        doomed = [write]
        while doomed:
            current = doomed.pop()
            self._count(counter)
            counter = "dump_dropped_after_failed"
            _remember(self._failed, current.key, None)
            current.doomed = True
            doomed.extend(current.after)
            current.after = []
            self._discard(current)

    def _discard(self, write: _Write) -> None:
        staged, write.staged = write.staged, None
        if staged is not None:
            self._pool.submit(partial(self._tier.discard, staged), lambda _: None, urgent=True)
        self._finish(write)

    def _finish(self, write: _Write) -> None:
        # A doomed write ends twice: when it fails, and when its staging returns. By then the queue
        # may hold another write of the same key.
        if self._writes.get(write.key) is write:
            del self._writes[write.key]
            self._slots.unpin(write.slot)

    def _drop(self, key: Key, waiting: list[_Write], counter: str) -> None:
        self._count(counter)
        _remember(self._failed, key, None)
        for write in waiting:
            self._fail(write, "dump_dropped_after_failed")


def _remember(memory: OrderedDict[Key, _V], key: Key, value: _V) -> None:
    memory[key] = value
    memory.move_to_end(key)
    if len(memory) > _REMEMBERED_KEYS:
        memory.popitem(last=False)
