"""The one builder of a node cache's decisions, without threads: its I/O ends when the test says so.

`node_parts` is for all who test a part of them; `Node` is a whole one with a client, and `Engine`
another engine beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from tests.parts.pools import HeldPool, Timers
from tests.store.tiers.memory_tier import MemoryTier
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.core import NodeCore
from ucm.store.node.lanes import Lanes
from ucm.store.node.notices import Notices
from ucm.store.node.parts import Behind, CallLater, NodeLimits, NodeParts, far_parts
from ucm.store.node.slots import SlotTable
from ucm.store.tiers.tier import NoTier, Tier, TierNamespace

PAGE = 4096
FINGERPRINT = sha256(b"held").digest()
NAMESPACE = TierNamespace(FINGERPRINT, PAGE, b"{}")
# Blocks of four tokens.
NAMESPACE_MESSAGE = p.OpenNamespace(
    ns=1, fingerprint=FINGERPRINT, page_bytes=PAGE, block_tokens=4, manifest=b"{}"
)


def key(i: int) -> Key:
    return Key(sha256(b"%d" % i).digest())


def node_parts(
    slots: SlotTable,
    memory: memoryview,
    *,
    tier: Tier,
    reads: Lanes,
    writes: Lanes,
    clock: Callable[[], float],
    call_later: CallLater,
    max_write_pages: int = 1000,
    **limits: Any,
) -> NodeParts:
    """`memory` holds the pages; nothing of it is taken ahead. `limits` are those of NodeLimits."""
    return NodeParts(
        slots=slots,
        tier=tier,
        reads=reads,
        writes=writes,
        control=writes,
        page_of=lambda slot: memory[slot.offset : slot.offset + slot.span.slot_bytes],
        populate=lambda offset, nbytes, on_done: None,
        clock=clock,
        call_later=call_later,
        notices=Notices(clock),
        limits=NodeLimits(ahead_bytes=0, max_write_pages=max_write_pages, **limits),
    )


class Node:
    def __init__(
        self,
        *,
        num_slots: int = 64,
        keeps_unpinned: bool = True,
        has_tier: bool = True,
        tier: MemoryTier | None = None,
        max_write_pages: int = 100,
        max_open_keys: int = 1_000,
        reads: Any = None,
        touch_every_s: float | None = None,
        has_far: bool = False,
    ) -> None:
        self.memory = memoryview(bytearray(PAGE * num_slots))
        self.tier = tier or MemoryTier()
        self.reads, self.writes = reads or HeldPool(), HeldPool()
        self.now_s = 0.0
        self.timers = Timers()
        parts = node_parts(
            SlotTable(PAGE * num_slots, extent_bytes=PAGE * 8, keeps_unpinned=keeps_unpinned),
            self.memory,
            tier=self.tier if has_tier else NoTier(),
            reads=self.lanes(self.reads) if has_tier else Lanes([], NoTier()),
            writes=self.lanes(self.writes) if has_tier else Lanes([], NoTier()),
            clock=lambda: self.now_s,
            call_later=self.timers,
            max_write_pages=max_write_pages,
            max_open_keys=max_open_keys,
            touch_every_s=touch_every_s,
        )
        if has_far:
            self.far = MemoryTier()
            self.far_reads, self.far_writes = HeldPool(), HeldPool()
            reads_far, writes_far = (
                Lanes([pool], self.far) for pool in (self.far_reads, self.far_writes)
            )
            behind = Behind(self.far, reads_far, writes_far, writes_far)
            parts = replace(parts, far=far_parts(parts, behind))
        self.core = NodeCore(parts)
        self.inbox: list[p.NodeMessage] = []
        hello = p.Hello(version=p.VERSION, session="s", role="store", pid=1)
        self.connection = self.core.connect(hello, self.inbox.append)
        self.core.handle(
            self.connection,
            NAMESPACE_MESSAGE,
        )
        self.writes.end_all()
        if has_far:
            self.far_writes.end_all()
        self.timers.waiting.clear()
        self.inbox.clear()

    def lanes(self, pool: Any) -> Lanes:
        return Lanes([pool], self.tier)

    def store(self, *keys: Key) -> None:
        self._store(self.tier, keys)

    def store_far(self, *keys: Key) -> None:
        self._store(self.far, keys)

    def _store(self, tier: MemoryTier, keys: Sequence[Key]) -> None:
        for each in keys:
            staged = tier.stage(NAMESPACE, each, memoryview(bytes(PAGE)), num_tokens=1)
            assert staged is not None
            tier.publish(staged)

    def reserve(self, *keys: Key) -> None:
        parents = [b""] * len(keys)
        self.core.handle(self.connection, p.Reserve(id=1, ns=1, keys=list(keys), parents=parents))
        self.inbox.clear()

    def commit(self, *keys: Key, parent: bytes = b"") -> None:
        parents = [parent] * len(keys)
        self.core.handle(self.connection, p.Commit(ns=1, keys=list(keys), parents=parents))

    def find(self, *keys: Key, storage: bool = False, number: int = 7) -> None:
        self.core.handle(
            self.connection,
            p.Find(id=number, ns=1, keys=list(keys), storage=storage, timeout_ms=1000),
        )

    def answer(self) -> tuple[list[int], str]:
        (found,) = [message for message in self.inbox if isinstance(message, p.Found)]
        self.inbox.clear()
        return list(found.places), found.reason

    def look_up(self, keys: list[Key], *, number: int, timeout_ms: int = 1000) -> None:
        self.core.handle(
            self.connection,
            p.Lookup(id=number, ns=1, keys=keys, read_from=0, load=True, timeout_ms=timeout_ms),
        )

    def expect(
        self,
        keys: list[Key],
        *,
        number: int = 1,
        promised: int | None = None,
        timeout_ms: int = 5000,
        renewed: bool = False,
        tail_tokens: int = 0,
    ) -> None:
        """A lookup of which the first `promised` blocks (all) are there or on their way."""
        lookup = p.Lookup(
            id=number,
            ns=1,
            keys=list(keys),
            read_from=0,
            load=True,
            timeout_ms=timeout_ms,
            promised=len(keys) if promised is None else promised,
            renewed=renewed,
            tail_tokens=tail_tokens,
        )
        self.core.handle(self.connection, lookup)

    def reply(self) -> p.LookupReply | None:
        """The answer to the only lookup, once it is there."""
        replies = [message for message in self.inbox if isinstance(message, p.LookupReply)]
        assert len(replies) <= 1
        return replies[0] if replies else None

    def told(self) -> dict[bytes, str]:
        """What this client was told last of each page that is not kept, and why."""
        told: dict[bytes, str] = {}
        for news in (message for message in self.inbox if isinstance(message, p.SavingNews)):
            told.update(dict.fromkeys(news.refused, news.reason))
            for key in news.saved:
                told.pop(key, None)
        return told

    def release(self, number: int) -> None:
        self.core.handle(self.connection, p.Release(lookups=[number]))

    def manifest(self, fingerprint: bytes) -> bytes:
        self.core.handle(self.connection, p.GetManifest(id=1, fingerprint=fingerprint))
        self.writes.end_all()
        (found,) = self.inbox
        assert isinstance(found, p.ManifestFound) and not found.error
        self.inbox.clear()
        return found.manifest

    def other_engine(self) -> Engine:
        return Engine(self)


class Engine:
    """Another engine of the same node. `doubted`: what it was told to promise to nobody when it
    reserved last."""

    def __init__(self, node: Node) -> None:
        self._core = node.core
        self.inbox: list[p.NodeMessage] = []
        hello = p.Hello(version=p.VERSION, session="other", role="scheduler", pid=2)
        self._connection = self._core.connect(hello, self.inbox.append)
        self._handle(NAMESPACE_MESSAGE)
        node.timers.waiting.clear()

    def _handle(self, message: p.ClientMessage) -> None:
        self._core.handle(self._connection, message)

    def reserve(self, *keys: Key, tail_tokens: int = 0) -> list[int]:
        self.inbox.clear()
        self._handle(
            p.Reserve(
                id=1, ns=1, keys=list(keys), parents=[b""] * len(keys), tail_tokens=tail_tokens
            )
        )
        (reply,) = [each for each in self.inbox if isinstance(each, p.ReserveReply)]
        first = len(keys) if reply.doubted_from is None else reply.doubted_from
        self.doubted = list(keys[first:])
        return reply.offsets

    def commit(self, *keys: Key) -> None:
        self._handle(p.Commit(ns=1, keys=list(keys), parents=[b""] * len(keys)))

    def saved(self) -> set[bytes]:
        """What this client was told to be saved after all."""
        news = [each for each in self.inbox if isinstance(each, p.SavingNews)]
        return {key for each in news for key in each.saved}

    def abort(self, *keys: Key) -> None:
        self._handle(p.Abort(ns=1, keys=list(keys)))

    def die(self) -> None:
        self._core.closed(self._connection)
