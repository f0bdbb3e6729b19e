"""What keeps pages in storage: the write-back, looking again at what was written long ago, and the
news of both for the clients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.parts import NodeParts
from ucm.store.node.rechecks import Rechecks, ready_pages
from ucm.store.node.saved import Met
from ucm.store.node.sessions import Connection, OpenedNamespace, Session
from ucm.store.node.slots import Slot
from ucm.store.node.write_through import FarWriteBack, NearWriteBack
from ucm.store.node.writeback import WriteBack

_TOLD_ROLES = ("scheduler", "store")


class NoWriteBack(WriteBack):
    """There is no storage: what is in memory is all that is kept, and that is nobody's fault."""

    def is_full(self, key: Key) -> bool:
        return False

    def take_place(self, key: Key) -> bool:
        return True

    def enqueue(self, namespace: OpenedNamespace, key: Key, parent: Key | None, slot: Slot) -> None:
        pass

    def meet(self, namespace: OpenedNamespace, pages: Sequence[Met]) -> tuple[list[Key], list[Met]]:
        return [], []


class Storing:
    """Owned by the event loop's thread. Without storage nothing is saved, and nobody is told."""

    def __init__(self, parts: NodeParts, sessions: Mapping[str, Session]) -> None:
        self._sessions = sessions
        self._slots = parts.slots
        self._has_storage = bool(parts.tier.lanes)
        self.writeback: WriteBack
        self.far: FarWriteBack | None = None
        self._far_rechecks: Rechecks | None = None
        if parts.far is not None:
            near = NearWriteBack(parts, parts.far, self.tell)
            self.writeback, self.far = near, near.far
            self._far_rechecks = Rechecks(parts.far, self.far)
        else:
            self.writeback = (WriteBack if self._has_storage else NoWriteBack)(parts, self.tell)
        self._rechecks = Rechecks(parts, self.writeback)
        self._writebacks = [each for each in (self.writeback, self.far) if each is not None]

    def met(
        self,
        connection: Connection,
        namespace: OpenedNamespace,
        keys: Sequence[Key],
        parents: Sequence[Key | None],
    ) -> None:
        """A client counts on those of `keys` that are in memory: what of them is unsaved is queued,
        or the client is told. `parents[i]` precedes `keys[i]`, and is here or in storage; there may
        be more of them."""
        if not self._has_storage:
            return
        unsaved: defaultdict[Outcome, list[bytes]] = defaultdict(list)
        pages = ready_pages(self._slots, keys, parents)
        if self._far_rechecks is not None:
            self._far_rechecks.meet(namespace, pages)
        for key in self._rechecks.meet(namespace, pages):
            unsaved[self.writeback.why_refused(key)].append(key)
        for reason, refused in unsaved.items():
            connection.send(p.SavingNews(refused=refused, saved=[], reason=reason))

    def doubted_from(self, keys: Sequence[Key], offsets: Sequence[int]) -> int | None:
        """Of pages that a client is about to dump, the number of the first that storage is likely
        to refuse: a promise that is given before it does would be waited for. They are tried all
        the same, and all from there on are told once they are saved."""
        filled = [i for i, offset in enumerate(offsets) if offset >= 0]
        doubts = ((i, reason) for i in filled if (reason := self._why_refused(keys[i])))
        first, reason = next(doubts, (None, Outcome.FINE))
        if first is not None:
            for key in (keys[i] for i in filled if i >= first):
                for each in self._writebacks:
                    each.note_refused(key, reason)
        return first

    def _why_refused(self, key: Key) -> Outcome:
        """FINE where one of the tiers is likely to take it."""
        reasons = [each.refusing.why(key) for each in self._writebacks]
        return reasons[0] if all(reasons) else Outcome.FINE

    def has_no_room(self, tier: int, lane: int, reason: Outcome) -> None:
        """Of the tiers, near first."""
        self._writebacks[tier].refusing.has_no_room(lane, reason)

    def tell(self, refused: Sequence[Key], saved: Sequence[Key], reason: Outcome) -> None:
        message = p.SavingNews(refused=list(refused), saved=list(saved), reason=reason)
        for session in self._sessions.values():
            for connection in session.connections:
                if connection.role in _TOLD_ROLES:
                    connection.send(message)
