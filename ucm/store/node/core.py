"""What the node cache decides: sessions, namespaces, lookups, dumps.

No sockets and no threads in here: the server calls `handle` and `closed`, the core answers through
`Connection.send` and puts storage work into the pools, whose results come back on the same
thread. So all of it runs under property tests with pools that answer when the test says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ucm.errors import ProtocolError
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.dumps import DumpRequests
from ucm.store.node.find import Finds
from ucm.store.node.lookups import Lookups
from ucm.store.node.message_checks import check_hello, check_message, check_namespace, check_open
from ucm.store.node.openings import Openings
from ucm.store.node.parts import NodeParts
from ucm.store.node.prefault import MemoryAhead
from ucm.store.node.sessions import Connection, OpenedNamespace, Session
from ucm.store.node.slots import Slot
from ucm.store.node.stalls import Stalls
from ucm.store.node.storing import Storing

_AFTER_HELD_UP_S = 0.25
# Who can commit what ranks have filled.
_COMMITTING = ("scheduler", "store")


class NodeCore:
    """The state of one node cache. All methods run on one thread."""

    def __init__(self, parts: NodeParts) -> None:
        self.slots = parts.slots
        self.counters = parts.counters
        self.count = parts.count
        self.notices = parts.notices
        self.notices.on_said = self._tell_notice
        self.sessions: dict[str, Session] = {}
        storing = Storing(parts, self.sessions)
        self.writeback = storing.writeback
        self.lookups = Lookups(parts, storing)
        self.finds = Finds(parts, storing)
        self._dumps = DumpRequests(parts, self.lookups.fills, storing)
        self._openings = Openings(parts, storing)
        self._ahead = MemoryAhead(
            parts.slots,
            up_to_bytes=parts.limits.ahead_bytes,
            populate=parts.populate,
            announce=self._tell_workers,
            clock=parts.clock,
        )
        self._limits = parts.limits
        self._reads = [tier.reads for tier in parts.tiers]
        self._writes = [tier.writes for tier in parts.tiers]
        self._control = [tier.control for tier in parts.tiers]
        hanging = [("read", lanes) for lanes in self._reads]
        hanging += [("written", lanes) for lanes in self._writes]
        self._stalls = Stalls(hanging, parts.notices)
        self._far = storing.far
        # Set when the process is about to end: what is queued is written, nothing new is begun.
        self.leaving = False

    def tick(self) -> None:
        """Finds what is late; takes memory while nobody waits. Called many times a second."""
        for lanes in (*self._reads, *self._writes, *self._control):
            lanes.tick()
        self._stalls.tick()
        self._openings.tick()
        self.writeback.tick()
        self.lookups.tick()
        self.finds.tick()
        if any(lanes.depth for lanes in self._reads) or self.lookups.num_open:
            self._ahead.is_busy()
        self._ahead.tick()

    def held_up(self) -> None:
        """This process has not run for a while. What storage did meanwhile is heard of only now, so
        nothing is called late yet."""
        self.count("held_up")
        self.lookups.wait_at_least(_AFTER_HELD_UP_S)

    # -- connections -----------------------------------------------------------------------

    def connect(self, hello: p.Hello, send: Callable[[p.NodeMessage], None]) -> Connection:
        check_hello(hello)
        session = self.sessions.get(hello.session) or Session(hello.session)
        if hello.role == "scheduler" and any(c.role == "scheduler" for c in session.connections):
            raise ProtocolError(f"session {hello.session} has a scheduler side already")
        self.sessions[session.name] = session
        connection = Connection(send=send, session=session, role=hello.role)
        session.connections.add(connection)
        if hello.role == "worker":
            for message in self._ahead.in_use():
                send(message)
        self._tell_ranks_ready(session)
        return connection

    def dropped(self, connection: Connection) -> None:
        """Nothing is heard from it any more, and it has not closed: it may still copy."""
        session = connection.session
        self.lookups.withdraw_all(connection)
        self.finds.withdraw_all(connection)
        if connection.role in _COMMITTING:
            self._dumps.set_aside_all(session)

    def closed(self, connection: Connection) -> None:
        """Unanswered lookups end now. What ranks may still be copying is kept until the session's
        last connection has closed, which the kernel does when the last of its processes ends."""
        session = connection.session
        self.dropped(connection)
        session.connections.discard(connection)
        if session.connections:
            self._tell_ranks_ready(session)
            return
        for slots in session.pinned.values():
            self._unpin(slots)
        self._dumps.end(session)
        self.sessions.pop(session.name, None)

    def _tell_ranks_ready(self, session: Session) -> None:
        count = sum(connection.memory_ready for connection in session.connections)
        for connection in session.connections:
            if connection.role == "scheduler":
                connection.send(p.RanksReady(count=count))

    def handle(self, connection: Connection, message: p.ClientMessage) -> None:
        """Acts on one message. Raises ProtocolError on one that makes no sense here."""
        self._ahead.is_busy()
        if isinstance(message, (p.Lookup, p.Find, p.Reserve, p.Commit)):
            namespace = self._namespace(connection, message.ns)
            check_message(message, namespace, self.slots, max_keys=self._limits.max_keys)
            self._handle_keys(connection, namespace, message)
        elif isinstance(message, p.Release):
            self._release(connection, message)
        elif isinstance(message, p.Abort):
            self._dumps.abort(connection.session, message)
        elif isinstance(message, p.OpenNamespace):
            check_namespace(message, connection.namespaces)
            self._openings.open(connection, message)
        elif isinstance(message, p.GetManifest):
            self._openings.find_manifest(connection, message)
        elif isinstance(message, p.MemoryReady):
            connection.memory_ready = True
            self._tell_ranks_ready(connection.session)
        else:
            raise ProtocolError(f"unexpected {type(message).__name__}")

    def _handle_keys(
        self,
        connection: Connection,
        namespace: OpenedNamespace,
        message: p.Lookup | p.Find | p.Reserve | p.Commit,
    ) -> None:
        if isinstance(message, (p.Lookup, p.Find)):
            check_open(message, connection.asked, max_open_keys=self._limits.max_open_keys)
            connection.asked.begin(message)
        if isinstance(message, p.Lookup):
            self.lookups.start(connection, namespace, message)
        elif isinstance(message, p.Find):
            self.finds.start(connection, namespace, message)
        elif isinstance(message, p.Reserve):
            self._dumps.reserve(connection, namespace, message, leaving=self.leaving)
        else:
            self._dumps.commit(connection.session, namespace, message)

    def _release(self, connection: Connection, message: p.Release) -> None:
        for lookup_id in message.lookups:
            self.lookups.withdraw(connection, lookup_id)
            connection.asked.end(p.Lookup, lookup_id)
            self._unpin(connection.session.pinned.pop((connection, lookup_id), []))
            self.lookups.touch(connection.session.heads.pop((connection, lookup_id), ()))

    def _unpin(self, slots: list[Slot]) -> None:
        # Tail first: the head of a prompt is shared by more prompts and should be evicted last.
        for slot in reversed(slots):
            self.slots.unpin(slot)

    def _namespace(self, connection: Connection, number: int) -> OpenedNamespace:
        namespace = connection.namespaces.get(number)
        if namespace is None:
            raise ProtocolError(f"namespace {number} was not opened on this connection")
        return namespace

    def removed_from_storage(self, keys: Sequence[Key]) -> None:
        """This node has reclaimed these pages. Those in memory stay; they are not saved any more,
        and who meets one queues it again."""
        for key in keys:
            self.writeback.note_gone(key)

    # -- what everybody may know -----------------------------------------------------------

    def _tell_workers(self, message: p.MemoryInUse) -> None:
        for session in self.sessions.values():
            for connection in session.connections:
                if connection.role == "worker":
                    connection.send(message)

    def _tell_notice(self, text: str) -> None:
        """Into the logs that people read. A store of the store API says what it can't do itself."""
        for session in self.sessions.values():
            for connection in session.connections:
                if connection.role == "scheduler":
                    connection.send(p.Notice(text=text))

    def queues(self) -> dict[str, int]:
        """Depths of everything that waits."""
        return {
            "reads": sum(lanes.depth for lanes in self._reads),
            "reads_overdue": sum(lanes.num_overdue for lanes in self._reads),
            "writes": sum(lanes.depth for lanes in self._writes),
            "writes_overdue": sum(lanes.num_overdue for lanes in self._writes),
            "write_pages": self.writeback.depth,
            "far_write_pages": self._far.depth if self._far is not None else 0,
            "lookups": self.lookups.num_open,
            "finds": self.finds.num_open,
        }

    def unwritten(self) -> list[int]:
        """How many pages wait to be written, by tier."""
        return [self.writeback.depth, *([self._far.depth] if self._far is not None else [])]

    def check(self) -> None:
        """Raises AssertionError with the broken sentence of a law of slots or lookups."""
        self.slots.check()
        self.lookups.check()

    def status(self, request_id: int, *, pid: int, arena: str, check: bool) -> p.Status:
        """Counts of everything; with `check`, whether the laws of slots and lookups hold."""
        counts = self.slots.counts()
        invariant = ""
        if check:
            try:
                self.check()
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
                "reads_stalled": sum(lanes.num_stalled for lanes in self._reads),
                "writes_stalled": sum(lanes.num_stalled for lanes in self._writes),
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
