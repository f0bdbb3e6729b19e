"""What keeps pages in storage: the write-back, looking again at what was written long ago, and the
news of both for the clients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.lanes import Lanes
from ucm.store.node.notices import Notices
from ucm.store.node.rechecks import Rechecks, ready_pages
from ucm.store.node.saved import SavingRules
from ucm.store.node.sessions import Connection, OpenedNamespace, Session
from ucm.store.node.slots import Slot, SlotTable
from ucm.store.node.writeback import WriteBack
from ucm.store.tiers.tier import Tier

_TOLD_ROLES = ("scheduler", "store")


class Storing:
    """Owned by the event loop's thread. Without a tier nothing is saved, and nobody is told."""

    def __init__(
        self,
        *,
        sessions: Mapping[str, Session],
        slots: SlotTable,
        tier: Tier | None,
        reads: Lanes,
        writes: Lanes,
        page_of: Callable[[Slot], memoryview],
        count: Callable[..., None],
        notices: Notices,
        max_pages: int,
        clock: Callable[[], float],
        rules: SavingRules,
    ) -> None:
        self.writeback: WriteBack | None = None
        self._sessions = sessions
        self._slots = slots
        self._rechecks: Rechecks | None = None
        if tier is None:
            return
        self.writeback = WriteBack(
            tier=tier,
            lanes=writes,
            slots=slots,
            page_of=page_of,
            count=count,
            notices=notices,
            max_pages=max_pages,
            clock=clock,
            tell=self.tell,
            rules=rules,
        )
        self._rechecks = Rechecks(
            tier=tier,
            reads=reads,
            writeback=self.writeback,
            slots=slots,
            count=count,
            notices=notices,
            max_pages=max_pages,
        )

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
        if self._rechecks is None or self.writeback is None:
            return
        unsaved: defaultdict[Outcome, list[bytes]] = defaultdict(list)
        for key in self._rechecks.meet(namespace, ready_pages(self._slots, keys, parents)):
            unsaved[self.writeback.why_refused(key)].append(key)
        for reason, refused in unsaved.items():
            connection.send(p.SavingNews(refused=refused, saved=[], reason=reason))

    def tell(self, refused: Sequence[Key], saved: Sequence[Key], reason: Outcome) -> None:
        message = p.SavingNews(refused=list(refused), saved=list(saved), reason=reason)
        for session in self._sessions.values():
            for connection in session.connections:
                if connection.role in _TOLD_ROLES:
                    connection.send(message)
