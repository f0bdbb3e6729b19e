"""A node cache's decisions without threads: its I/O ends when the test says so."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

from ucm.errors import TierError
from ucm.store.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.core import NodeCore
from ucm.store.slots import Slot, SlotTable
from ucm.store.tier import MemoryTier, TierNamespace

PAGE = 4096
FINGERPRINT = sha256(b"held").digest()
NAMESPACE = TierNamespace(FINGERPRINT, PAGE, b"{}")


def key(i: int) -> Key:
    return Key(sha256(b"%d" % i).digest())


class HeldPool:
    """Calls end when the test says so."""

    num_threads = 4

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], object], Callable[[object], None]]] = []
        self.stalled = False

    depth = property(lambda self: len(self.jobs))
    num_overdue = 0

    def submit(self, call, on_done, *, on_overdue=None, urgent=False) -> None:
        self.jobs.append((call, on_done))

    def tick(self) -> None:
        pass

    def end_one(self) -> None:
        call, on_done = self.jobs.pop(0)
        on_done(call())

    def end_all(self, error: TierError | None = None) -> None:
        while self.jobs:
            call, on_done = self.jobs.pop(0)
            on_done(error or call())


class Node:
    def __init__(self, *, num_slots: int = 64, keeps_unpinned: bool = True) -> None:
        self.memory = memoryview(bytearray(PAGE * num_slots))
        self.tier = MemoryTier()
        self.reads, self.writes = HeldPool(), HeldPool()
        self.now_s = 0.0
        self.core = NodeCore(
            slots=SlotTable(PAGE * num_slots, extent_bytes=PAGE * 8, keeps_unpinned=keeps_unpinned),
            tier=self.tier,
            reads=self.reads,
            writes=self.writes,
            page_of=self.page_of,
            populate=lambda offset, nbytes, on_done: None,
            ahead_bytes=0,
            max_write_pages=100,
            clock=lambda: self.now_s,
        )
        self.inbox: list[p.NodeMessage] = []
        hello = p.Hello(version=p.VERSION, session="s", role="store", pid=1)
        self.connection = self.core.connect(hello, self.inbox.append)
        self.core.handle(
            self.connection,
            p.OpenNamespace(
                ns=1, fingerprint=FINGERPRINT, page_bytes=PAGE, block_tokens=1, manifest=b"{}"
            ),
        )
        self.writes.end_all()
        self.inbox.clear()

    def page_of(self, slot: Slot) -> memoryview:
        return self.memory[slot.offset : slot.offset + PAGE]

    def store(self, *keys: Key) -> None:
        for each in keys:
            staged = self.tier.stage(NAMESPACE, each, memoryview(bytes(PAGE)), num_tokens=1)
            assert staged is not None
            self.tier.publish(staged)

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
        (found,) = self.inbox
        assert isinstance(found, p.Found)
        self.inbox.clear()
        return list(found.places), found.reason

    def look_up(self, keys: list[Key], *, number: int, timeout_ms: int = 1000) -> None:
        self.core.handle(
            self.connection,
            p.Lookup(id=number, ns=1, keys=keys, read_from=0, load=True, timeout_ms=timeout_ms),
        )
