"""A node cache's decisions without threads: its I/O ends when the test says so."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

from tests.store.memory_tier import MemoryTier
from ucm.errors import TierError
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.core import NodeCore
from ucm.store.node.lanes import Lanes
from ucm.store.node.slots import Slot, SlotTable
from ucm.store.tiers.tier import TierNamespace

PAGE = 4096
FINGERPRINT = sha256(b"held").digest()
NAMESPACE = TierNamespace(FINGERPRINT, PAGE, b"{}")
# Pages of two rows of four tokens.
NAMESPACE_MESSAGE = p.OpenNamespace(
    ns=1, fingerprint=FINGERPRINT, page_bytes=PAGE, block_tokens=4, num_rows=2, manifest=b"{}"
)


def key(i: int) -> Key:
    return Key(sha256(b"%d" % i).digest())


class HeldPool:
    """Calls end when the test says so."""

    num_threads = 4
    hung: tuple[()] = ()

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


class DisorderlyPool:
    """Threads whose calls end when the test says so, in the order it says."""

    num_threads = 4

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], object], Callable[[object], None], object]] = []
        self.hung: list[tuple[Callable[[], object], Callable[[object], None]]] = []

    depth = property(lambda self: len(self.jobs) + len(self.hung))
    num_overdue = property(lambda self: len(self.hung))
    stalled = property(lambda self: len(self.hung) * 2 >= self.num_threads)

    def submit(self, call, on_done, *, on_overdue=None, urgent=False) -> None:
        self.jobs.append((call, on_done, on_overdue))

    def tick(self) -> None:
        pass

    def end(self, index: int, *, fail: bool) -> None:
        call, on_done, _ = self.jobs.pop(index % len(self.jobs))
        on_done(TierError("the disk is on fire", reason="io_error") if fail else _result(call))

    def hang(self, index: int) -> None:
        call, on_done, on_overdue = self.jobs.pop(index % len(self.jobs))
        self.hung.append((call, on_done))
        if on_overdue is not None:
            on_overdue()

    def return_late(self) -> None:
        call, on_done = self.hung.pop(0)
        on_done(_result(call))


def _result(call: Callable[[], object]) -> object:
    try:
        return call()
    except TierError as error:
        return error


class Timers:
    """Calls for later, made when the test says so, however long that is."""

    def __init__(self) -> None:
        self.waiting: list[tuple[float, Callable[[], None]]] = []

    def __call__(self, pause_s: float, call: Callable[[], None]) -> None:
        self.waiting.append((pause_s, call))

    def fire(self) -> list[float]:
        """Makes the calls that wait now. Returns for how long they were to."""
        fired, self.waiting = self.waiting, []
        for _, call in fired:
            call()
        return [pause_s for pause_s, _ in fired]


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
    ) -> None:
        self.memory = memoryview(bytearray(PAGE * num_slots))
        self.tier = tier or MemoryTier()
        self.reads, self.writes = reads or HeldPool(), HeldPool()
        self.now_s = 0.0
        self.timers = Timers()
        self.core = NodeCore(
            slots=SlotTable(PAGE * num_slots, extent_bytes=PAGE * 8, keeps_unpinned=keeps_unpinned),
            tier=self.tier if has_tier else None,
            reads=self.lanes(self.reads),
            writes=self.lanes(self.writes),
            page_of=self.page_of,
            populate=lambda offset, nbytes, on_done: None,
            ahead_bytes=0,
            max_write_pages=max_write_pages,
            max_open_keys=max_open_keys,
            clock=lambda: self.now_s,
            call_later=self.timers,
        )
        self.inbox: list[p.NodeMessage] = []
        hello = p.Hello(version=p.VERSION, session="s", role="store", pid=1)
        self.connection = self.core.connect(hello, self.inbox.append)
        self.core.handle(
            self.connection,
            NAMESPACE_MESSAGE,
        )
        self.writes.end_all()
        self.timers.waiting.clear()
        self.inbox.clear()

    def lanes(self, pool: Any) -> Lanes:
        return Lanes([pool], None)

    def page_of(self, slot: Slot) -> memoryview:
        return self.memory[slot.offset : slot.offset + slot.span.slot_bytes]

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
    """Another engine of the same node."""

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
        return reply.offsets

    def commit(self, *keys: Key) -> None:
        self._handle(p.Commit(ns=1, keys=list(keys), parents=[b""] * len(keys)))

    def abort(self, *keys: Key) -> None:
        self._handle(p.Abort(ns=1, keys=list(keys)))

    def die(self) -> None:
        self._core.closed(self._connection)
