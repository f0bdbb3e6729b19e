"""What a client holds a node cache's answers to. No I/O.

Whoever reads an answer indexes with it, and ranks copy to where it points. So one that doesn't fit
its question reaches nobody: it is a fault of the node cache, and ends the connection. An answer
to what was not asked, or was taken back, has no question to fit, and means nothing to anybody.
"""

from __future__ import annotations

from collections.abc import Sequence

from ucm.errors import ProtocolError
from ucm.store.node import protocol as p

_NO_OFFSETS = (p.HAVE, p.NO_ROOM)
_Question = p.Lookup | p.Reserve | p.Find | p.GetManifest
_ANSWERS = (p.LookupReply, p.ReserveReply, p.Found, p.ManifestFound)


class Answers:
    """Of one connection, whose questions have ids of their own. Remembers what is asked and not
    answered, which its owner bounds."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._page_bytes: dict[int, int] = {}
        self._asked: dict[int, _Question] = {}

    def asked(self, message: p.ClientMessage) -> None:
        """It is about to be sent."""
        if isinstance(message, p.OpenNamespace):
            self._page_bytes[message.ns] = message.page_bytes
        elif isinstance(message, (p.Lookup, p.Reserve, p.Find, p.GetManifest)):
            self._asked[message.id] = message
        elif isinstance(message, p.Release):
            for lookup_id in message.lookups:
                self._asked.pop(lookup_id, None)

    def check(self, message: p.NodeMessage) -> None:
        """Raises ProtocolError for an answer that doesn't fit its question, or is of another
        kind."""
        fits = True
        if isinstance(message, _ANSWERS):
            question = self._asked.pop(message.id, None)
            fits = question is None or self._fits(question, message)
        elif isinstance(message, p.MemoryInUse):
            fits = 0 <= message.offset <= message.offset + message.nbytes <= self._capacity_bytes
        if not fits:
            raise ProtocolError(f"its {type(message).__name__} doesn't fit what it was asked")

    def _fits(self, question: _Question, answer: p.NodeMessage) -> bool:
        if isinstance(question, p.Lookup):
            return isinstance(answer, p.LookupReply) and self._fits_lookup(question, answer)
        if isinstance(question, p.Reserve):
            return isinstance(answer, p.ReserveReply) and self._fits_reserve(question, answer)
        if isinstance(question, p.Find):
            return isinstance(answer, p.Found) and len(answer.places) == len(question.keys)
        return isinstance(answer, p.ManifestFound)

    def _fits_lookup(self, lookup: p.Lookup, reply: p.LookupReply) -> bool:
        num_asked = len(lookup.keys) - lookup.read_from
        num_offsets = reply.num_stored if lookup.load else 0
        return (
            0 <= reply.num_stored <= num_asked
            and len(reply.offsets) == num_offsets
            and 0 <= reply.head_stored <= lookup.read_from
            and 0 <= reply.from_files <= num_asked
            and 0 <= reply.refused <= num_asked - reply.num_stored
            and 0 <= reply.brought <= num_offsets
            and self._are_inside(reply.offsets, lookup.ns)
        )

    def _fits_reserve(self, reserve: p.Reserve, reply: p.ReserveReply) -> bool:
        given = [offset for offset in reply.offsets if offset not in _NO_OFFSETS]
        return len(reply.offsets) == len(reserve.keys) and self._are_inside(given, reserve.ns)

    def _are_inside(self, offsets: Sequence[int], ns: int) -> bool:
        last = self._capacity_bytes - self._page_bytes.get(ns, 0)
        return all(0 <= offset <= last for offset in offsets)
