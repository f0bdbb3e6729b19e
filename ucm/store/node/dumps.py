"""What engines dump: slots that they fill, and what happens when these are full or given up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ucm.errors import ProtocolError
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.fills import Fills
from ucm.store.node.parts import NodeParts
from ucm.store.node.sessions import Connection, OpenedNamespace, Session
from ucm.store.node.slots import Slot, SlotState
from ucm.store.node.storing import Storing

_AnyKey = TypeVar("_AnyKey", bound=bytes)


class DumpRequests:
    """Owned by the event loop's thread. The sessions know what is theirs."""

    def __init__(self, parts: NodeParts, fills: Fills, storing: Storing) -> None:
        self._slots = parts.slots
        self._count = parts.count
        self._fills = fills
        self._writeback = storing.writeback
        self._on_met = storing.met
        self._doubted_from = storing.doubted_from
        self._tell = storing.tell
        # Keys of FILLING slots that somebody else counts on, having been told HAVE.
        self._counted_on: set[Key] = set()

    def reserve(
        self,
        connection: Connection,
        namespace: OpenedNamespace,
        message: p.Reserve,
        *,
        leaving: bool,
    ) -> None:
        """Answers with slots as far as there is room; with `leaving` there is none."""
        offsets: list[int] = []
        keys = p.keys_of(message)
        for key, parent in _with_parents(keys, message.parents):
            offset = self._reserve_one(connection, namespace, key, parent, leaving=leaving)
            offsets.append(offset)
            if offset == p.NO_ROOM:
                for lost in keys[len(offsets) - 1 :]:
                    self._fills.will_not_begin(lost, Outcome.NO_ROOM)
                # Nothing leads to a block whose predecessor is missing.
                offsets += [p.NO_ROOM] * (len(message.keys) - len(offsets))
                if not message.will_ask_again:
                    why = Outcome.LEAVING if leaving else self._why_no_room(key)
                    self._count(f"dump_dropped_{why}")
                break
        doubted_from = None
        if connection.role == "scheduler":  # who may promise them
            doubted_from = self._doubted_from(keys, offsets)
        reply = p.ReserveReply(id=message.id, offsets=offsets, doubted_from=doubted_from)
        connection.send(reply)

    def _why_no_room(self, key: Key) -> str:
        return Outcome.QUEUE_FULL if self._writeback.is_full(key) else Outcome.NO_ROOM

    def _reserve_one(
        self,
        connection: Connection,
        namespace: OpenedNamespace,
        key: Key,
        parent: Key | None,
        *,
        leaving: bool,
    ) -> int:
        slot = self._slots.find(key)
        if slot is not None:
            self._slots.touch(slot)
            if slot.state is SlotState.READY:
                self._on_met(connection, namespace, [key], [parent])
            elif key not in connection.session.filling:
                self._counted_on.add(key)
            return p.HAVE
        filling = None if leaving else self._fills.begin_dump(key, namespace)
        if filling is None:
            return p.NO_ROOM
        connection.session.filling[key] = filling
        return filling.slot.offset

    def commit(self, session: Session, namespace: OpenedNamespace, message: p.Commit) -> None:
        for committed, parent in _with_parents(message.keys, message.parents):
            filling = session.filling.get(Key(committed))
            if filling is None:
                continue
            if filling.namespace.tier.fingerprint != namespace.tier.fingerprint:
                raise ProtocolError(f"key {committed.hex()} was reserved in another namespace")
            del session.filling[filling.key]
            self._counted_on.discard(filling.key)
            self._count("dump_committed")
            self._fills.dumped(filling, parent)

    def abort(self, session: Session, message: p.Abort) -> None:
        for key in map(Key, message.keys):
            if key in session.filling:
                self._give_up(session, key)

    def set_aside_all(self, session: Session) -> None:
        """Nobody is left who could commit, and somebody who may still write: what was being filled
        is absent from now on, and its memory out of use until `end`."""
        for key in list(session.filling):
            session.aside.append(self._give_up(session, key, is_written=True))

    def end(self, session: Session) -> None:
        """Nobody writes any more."""
        for key in list(session.filling):
            self._give_up(session, key)
        for slot in session.aside:
            self._fills.unused(slot)
        session.aside = []

    def _give_up(self, session: Session, key: Key, *, is_written: bool = False) -> Slot:
        filling = session.filling.pop(key)
        self._count("dump_aborted")
        if key in self._counted_on:
            self._counted_on.discard(key)
            self._tell([key], (), Outcome.ABORTED)
        self._fills.gone(filling, Outcome.NEVER_STORED, is_written=is_written)
        return filling.slot


def _with_parents(
    keys: Sequence[_AnyKey], parents: Sequence[bytes]
) -> list[tuple[_AnyKey, Key | None]]:
    if len(keys) != len(parents):
        raise ProtocolError(f"{len(keys)} keys with {len(parents)} parents")
    return [(k, Key(p) if p else None) for k, p in zip(keys, parents, strict=True)]
