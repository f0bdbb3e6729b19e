"""Pages of one prompt that are published side by side, where publishing is what takes the time.

One after the other, as their order asks, the pages of a prompt would keep one thread busy and the
others idle. Instead a page may go while those before it are on their way, in its order, and no more
of a lane than it has threads. One behind which nothing waits goes when all before it are there: it
may be the last of its prompt, which stands for all.

Where one fails, those that are being published then go on, and are of use again when the one that
failed was written once more; what waits for them is given up.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from ucm.store.blocks.keys import Key
from ucm.store.node.io_threads import LanePool
from ucm.store.node.sessions import OpenedNamespace
from ucm.store.node.slots import Slot
from ucm.store.tiers.tier import Staged


@dataclass(eq=False, slots=True)
class Write:
    """A page on its way to storage. `before` was when it came, and is older. `after` wait for this
    one to be published, and `begun` have waited; a write that is being published waits for nothing,
    and storage reads its page."""

    namespace: OpenedNamespace
    key: Key
    parent: Key | None
    slot: Slot
    pool: LanePool
    before: Write | None
    staged: Staged | None = None
    waits_for: Write | None = None
    is_publishing: bool = False
    has_ended: bool = False
    doomed: bool = False
    after: list[Write] = field(default_factory=list)
    begun: list[Write] = field(default_factory=list)

    def keep_waiting(self, writes: list[Write]) -> None:
        """These, which have waited for somebody to bring its page, wait for it."""
        self.after = writes
        for write in writes:
            write.waits_for = self

    def take_behind(self) -> list[Write]:
        """All that wait for it, or for one that has; nothing waits for these then."""
        waiting, passed = [], [self]
        while passed:
            write = passed.pop()
            waiting += write.after
            passed += write.begun
            write.after, write.begun = [], []
        return waiting

    def begin_after(self) -> list[Write]:
        """Those that waited for it, and need not any more."""
        begun, self.after = self.after, []
        self.begun = [*self.begun, *begun] if self.nearest_under_way() is not None else []
        return begun

    def nearest_under_way(self) -> Write | None:
        """Of those before it. Lets go of those that have ended."""
        while self.before is not None and self.before.has_ended:
            self.before = self.before.before
        return self.before


class Abreast:
    """Owned by the event loop's thread. Says what waits for what, and what need not."""

    def __init__(self, writes: Mapping[Key, Write], *, is_on: bool) -> None:
        """`writes` are all that are under way. Unless it `is_on`, none goes beside another."""
        self._writes = writes
        self._is_on = is_on
        self._num_publishing: Counter[LanePool] = Counter()
        # Those that wait for one that is being published; some may have gone or ended meanwhile.
        self._next: defaultdict[LanePool, deque[Write]] = defaultdict(deque)

    def must_wait_for(self, write: Write) -> Write | None:
        """Who is on its way, and before `write`, which is staged. None: it may be published."""
        parent = None if write.parent is None else self._writes.get(write.parent)
        if parent is not None:
            return None if self._waits_for(parent, write) else parent
        return None if write.after or not self._is_on else write.nearest_under_way()

    def wait(self, write: Write, before: Write) -> None:
        write.waits_for = before
        before.after.append(write)
        self._may_go(write)
        self._may_go(before)

    def begins(self, write: Write) -> None:
        write.is_publishing = True
        self._num_publishing[write.pool] += 1
        for after in write.after:
            self._may_go(after)

    def ends(self, write: Write) -> None:
        write.is_publishing = False
        self._num_publishing[write.pool] -= 1

    def next(self, pool: LanePool) -> Write | None:
        """One that may be published beside the one before it."""
        waiting = self._next[pool]
        while waiting and self._num_publishing[pool] < pool.num_threads:
            write = waiting.popleft()
            before = write.waits_for
            if before is not None and before.is_publishing and write in before.after:
                before.after.remove(write)
                before.begun.append(write)
                write.waits_for = None
                return write
        return None

    def _may_go(self, write: Write) -> None:
        before = write.waits_for if write.after else None
        if not self._is_on or before is None or not before.is_publishing:
            return
        if before.pool is write.pool:
            self._next[write.pool].append(write)

    def _waits_for(self, write: Write | None, other: Write) -> bool:
        """Whether `write` can only be published after `other`: a client that says nonsense about
        what precedes what must not let pages wait for themselves."""
        if not other.after:
            return write is other
        while write is not None and write is not other:
            write = write.waits_for
        return write is other
