"""What the node cache decides: sessions, namespaces, lookups, dumps.

No sockets and no threads in here: the server calls `handle` and `closed`, the core answers through
`Connection.send` and puts storage work into the pools, whose results come back on the same
thread. So all of it runs under property tests with pools that answer when the test says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

from ucm.errors import ProtocolError
from ucm.store.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.ahead import MemoryAhead, Populate
from ucm.store.node.finds import Finds
from ucm.store.node.io import Pool
from ucm.store.node.lookups import Lookups
from ucm.store.node.notices import Notices
from ucm.store.node.state import Connection, OpenedNamespace, Session
from ucm.store.node.writeback import WriteBack
from ucm.store.page import padded_bytes
from ucm.store.slots import Slot, SlotState, SlotTable
from ucm.store.tier import Tier, TierNamespace


class NodeCore:
    """The state of one node cache. All methods run on one thread."""

    def __init__(
        self,
        *,
        slots: SlotTable,
        tier: Tier | None,
        reads: Pool,
        writes: Pool,
        page_of: Callable[[Slot], memoryview],
        populate: Populate,
        ahead_bytes: int,
        max_write_pages: int,
        clock: Callable[[], float],
    ) -> None:
        self.slots = slots
        self.counters: Counter[str] = Counter()
        self.sessions: dict[str, Session] = {}
        notices = Notices(clock)
        self.writeback: WriteBack | None = None
        if tier is not None:
            self.writeback = WriteBack(
                tier=tier,
                pool=writes,
                slots=slots,
                page_of=page_of,
                count=self.count,
                notices=notices,
                max_pages=max_write_pages,
                clock=clock,
            )
        self.lookups = Lookups(
            slots=slots,
            tier=tier,
            reads=reads,
            writeback=self.writeback,
            page_of=page_of,
            count=self.count,
            notices=notices,
            clock=clock,
        )
        self.finds = Finds(
            slots=slots, tier=tier, reads=reads, writeback=self.writeback, clock=clock
        )
        # Set when the process is about to end: what is queued is written, nothing new is begun.
        self.leaving = False
        self._tier = tier
        self._reads = reads
        self._writes = writes
        self._ahead = MemoryAhead(
            slots,
            up_to_bytes=ahead_bytes,
            populate=populate,
            announce=self._tell_workers,
            clock=clock,
        )

    def count(self, counter: str, by: int = 1) -> None:
        self.counters[counter] += by

    def tick(self) -> None:
        """Finds what is late; takes memory while nobody waits. Called many times a second."""
        self._reads.tick()
        self._writes.tick()
        self.lookups.tick()
        self.finds.tick()
        if self._reads.depth or self.lookups.num_open:
            self._ahead.is_busy()
        self._ahead.tick()

    # -- connections -----------------------------------------------------------------------

    def connect(self, hello: p.Hello, send: Callable[[p.NodeMessage], None]) -> Connection:
        session = self.sessions.setdefault(hello.session, Session(hello.session))
        if hello.role == "scheduler" and any(c.role == "scheduler" for c in session.connections):
            raise ProtocolError(f"session {hello.session} has a scheduler side already")
        connection = Connection(send=send, session=session, role=hello.role)
        session.connections.add(connection)
        if hello.role == "worker":
            for message in self._ahead.in_use():
                send(message)
        self._tell_ranks_ready(session)
        return connection

    def closed(self, connection: Connection) -> None:
        """Unanswered lookups end now. What ranks may still be copying is kept until the session's
        last connection has closed, which the kernel does when the last of its processes ends."""
        session = connection.session
        self.lookups.withdraw_all(connection)
        self.finds.withdraw_all(connection)
        session.connections.discard(connection)
        if session.connections:
            self._tell_ranks_ready(session)
            return
        for slots in session.pinned.values():
            self._unpin(slots)
        for key, slot in list(session.filling.items()):
            self._give_up_filling(session, key, slot)
        self.sessions.pop(session.name, None)

    def _tell_ranks_ready(self, session: Session) -> None:
        count = sum(connection.memory_ready for connection in session.connections)
        for connection in session.connections:
            if connection.role == "scheduler":
                connection.send(p.RanksReady(count=count))

    def handle(self, connection: Connection, message: p.ClientMessage) -> None:
        """Acts on one message. Raises ProtocolError on one that makes no sense here."""
        self._ahead.is_busy()
        if isinstance(message, p.Lookup):
            namespace = self._namespace(connection, message.ns)
            self.lookups.start(connection, namespace, message)
        elif isinstance(message, p.Find):
            self.finds.start(connection, self._namespace(connection, message.ns), message)
        elif isinstance(message, p.Release):
            self._release(connection, message)
        elif isinstance(message, p.Reserve):
            self._reserve(connection, message)
        elif isinstance(message, p.Commit):
            self._commit(connection, message)
        elif isinstance(message, p.Abort):
            self._abort(connection.session, message)
        elif isinstance(message, p.OpenNamespace):
            self._open_namespace(connection, message)
        elif isinstance(message, p.MemoryReady):
            connection.memory_ready = True
            self._tell_ranks_ready(connection.session)
        else:
            raise ProtocolError(f"unexpected {type(message).__name__}")

    def _release(self, connection: Connection, message: p.Release) -> None:
        for lookup_id in message.lookups:
            self.lookups.withdraw(connection, lookup_id)
            self._unpin(connection.session.pinned.pop((connection, lookup_id), []))

    def _unpin(self, slots: list[Slot]) -> None:
        # Tail first: the head of a prompt is shared by more prompts and should be evicted last.
        for slot in reversed(slots):
            self.slots.unpin(slot)

    # -- namespaces ------------------------------------------------------------------------

    def _open_namespace(self, connection: Connection, message: p.OpenNamespace) -> None:
        def answer(result: object) -> None:
            error = str(result) if isinstance(result, Exception) else ""
            connection.send(p.NamespaceOpened(ns=message.ns, error=error, refused=False))

        slot_bytes = padded_bytes(message.page_bytes)
        if not self.slots.fits(slot_bytes):
            error = (
                f"one page takes {slot_bytes} bytes and the node cache has "
                f"{self.slots.capacity_bytes}: raise cache_buffer_capacity_gb"
            )
            connection.send(p.NamespaceOpened(ns=message.ns, error=error, refused=True))
            return
        namespace = TierNamespace(
            fingerprint=message.fingerprint,
            page_bytes=message.page_bytes,
            manifest_json=message.manifest,
        )
        connection.namespaces[message.ns] = OpenedNamespace(
            tier=namespace, slot_bytes=slot_bytes, block_tokens=message.block_tokens
        )
        if self._tier is None:
            answer(None)
        else:
            self._writes.submit(partial(self._tier.open_namespace, namespace), answer)

    def _namespace(self, connection: Connection, number: int) -> OpenedNamespace:
        namespace = connection.namespaces.get(number)
        if namespace is None:
            raise ProtocolError(f"namespace {number} was not opened on this connection")
        return namespace

    # -- dumps -----------------------------------------------------------------------------

    def _reserve(self, connection: Connection, message: p.Reserve) -> None:
        namespace = self._namespace(connection, message.ns)
        offsets: list[int] = []
        for key, parent in _with_parents(message.keys, message.parents):
            offset = self._reserve_one(connection.session, namespace, key, parent)
            offsets.append(offset)
            if offset == p.NO_ROOM:
                # Nothing leads to a block whose predecessor is missing.
                offsets += [p.NO_ROOM] * (len(message.keys) - len(offsets))
                if not message.will_ask_again:
                    self.count(f"dump_dropped_{self._why_no_room()}")
                break
        connection.send(p.ReserveReply(id=message.id, offsets=offsets))

    def _why_no_room(self) -> str:
        if self.leaving:
            return "leaving"
        return "queue_full" if self.writeback is not None and self.writeback.is_full else "no_room"

    def _reserve_one(
        self, session: Session, namespace: OpenedNamespace, key: Key, parent: Key | None
    ) -> int:
        writeback = self.writeback
        slot = self.slots.find(key)
        if slot is not None:
            self.slots.touch(slot)
            if slot.state is SlotState.READY and writeback and not writeback.is_safe(key):
                # It was dropped from a full queue, or its file went bad: another try.
                writeback.enqueue(namespace, key, parent, slot)
            return p.HAVE
        if self.leaving or (writeback is not None and writeback.is_full):
            return p.NO_ROOM
        slot = self.slots.reserve(key, namespace.slot_bytes)
        if slot is None:
            return p.NO_ROOM
        session.filling[key] = slot
        return slot.offset

    def _commit(self, connection: Connection, message: p.Commit) -> None:
        namespace = self._namespace(connection, message.ns)
        for key, parent in _with_parents(message.keys, message.parents):
            slot = connection.session.filling.pop(key, None)
            if slot is None:
                continue
            self.slots.ready(slot)
            self.count("dump_committed")
            if self.writeback is not None:
                self.writeback.enqueue(namespace, key, parent, slot)
            self.lookups.resolve(slot, "")

    def _abort(self, session: Session, message: p.Abort) -> None:
        for key in map(Key, message.keys):
            slot = session.filling.get(key)
            if slot is not None:
                self._give_up_filling(session, key, slot)

    def _give_up_filling(self, session: Session, key: Key, slot: Slot) -> None:
        del session.filling[key]
        self.count("dump_aborted")
        self.slots.abandon(slot)
        if self.writeback is not None:
            self.writeback.filling_ended(key)
        self.lookups.resolve(slot, "never_stored")

    # -- what everybody may know -----------------------------------------------------------

    def _tell_workers(self, message: p.MemoryInUse) -> None:
        for session in self.sessions.values():
            for connection in session.connections:
                if connection.role == "worker":
                    connection.send(message)

    def queues(self) -> dict[str, int]:
        """Depths of everything that waits."""
        return {
            "reads": self._reads.depth,
            "reads_overdue": self._reads.num_overdue,
            "writes": self._writes.depth,
            "writes_overdue": self._writes.num_overdue,
            "write_pages": self.writeback.depth if self.writeback is not None else 0,
            "lookups": self.lookups.num_open,
            "finds": self.finds.num_open,
        }

    def status(self, request_id: int, *, pid: int, arena: str) -> p.Status:
        """Counts of everything, and whether the conservation law of the slots holds."""
        counts = self.slots.counts()
        try:
            self.slots.check()
            invariant = ""
        except AssertionError as error:
            invariant = str(error) or "broken"
        return p.Status(
            id=request_id,
            pid=pid,
            arena=arena,
            slots={
                "free": counts.free,
                "filling": counts.filling,
                "ready": counts.ready,
                "aside": counts.aside,
                "pins": counts.pins,
                "evictions": self.slots.evictions,
                "capacity_bytes": self.slots.capacity_bytes,
            },
            sessions={
                session.name: {
                    "connections": len(session.connections),
                    "filling": len(session.filling),
                    "pins": sum(len(slots) for slots in session.pinned.values()),
                }
                for session in self.sessions.values()
            },
            queues=self.queues(),
            counters=dict(self.counters),
            invariant=invariant,
        )


def _with_parents(keys: list[bytes], parents: list[bytes]) -> list[tuple[Key, Key | None]]:
    if len(keys) != len(parents):
        raise ProtocolError(f"{len(keys)} keys with {len(parents)} parents")
    return [(Key(k), Key(p) if p else None) for k, p in zip(keys, parents, strict=True)]
