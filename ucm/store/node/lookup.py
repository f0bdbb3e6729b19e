"""What one lookup knows: a prefix that only ever shortens, and what of it is here. No I/O."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node.pool import Pool
from ucm.store.node.sessions import Connection, OpenedNamespace
from ucm.store.node.slots import Slot

FIRST_PROBE = 8
PROBE_GROUP = 16


@dataclass(eq=False, slots=True)
class LookupJob:
    """State of one lookup. `pinned` maps block index to slot; `waiting` holds blocks whose slot is
    being filled; `unprobed` the blocks of the tail that storage must be asked about, in order;
    `unread` is a heap of those that it has. Of the first `promised` blocks those that storage lacks
    stay unprobed: they are looked for until the deadline (`promises.py`)."""

    id: int
    connection: Connection
    namespace: OpenedNamespace
    keys: Sequence[Key]
    read_from: int
    load: bool
    deadline_s: float
    end: int
    promised: int = 0
    # Seconds by which each page that comes puts off the deadline.
    renewal_s: float = 0.0
    head_stored: int = 0
    head_probes: int = 0
    unprobed: list[int] = field(default_factory=list)
    probes_running: int = 0
    unread: list[int] = field(default_factory=list)
    # By the pool that has them.
    reads_running: Counter[Pool] = field(default_factory=Counter)
    waiting: set[int] = field(default_factory=set)
    pinned: dict[int, Slot] = field(default_factory=dict)
    stored: set[int] = field(default_factory=set)
    # Every block of [read_from, had) is pinned or stored. Only grows, so that the pages of a long
    # prompt, which come in one by one, are not counted from the start each time.
    had: int = field(init=False)
    # Unprobed blocks that somebody may bring.
    wanted: set[int] = field(default_factory=set)
    look_pending: bool = False
    pause_s: float = 0.0
    # When to doubt next that what can't be seen isn't there; None before the first look.
    doubt_s: float | None = None
    doubt_pause_s: float = 0.0
    # The last promised block is in storage, so it has them all.
    all_there: bool = False
    # An engine of this node brings pages.
    is_fed: bool = False
    from_files: int = 0
    reason: Outcome = Outcome.FINE
    closed: bool = False

    def __post_init__(self) -> None:
        self.had = self.read_from

    def shorten(self, end: int, reason: Outcome) -> None:
        """Block `end` can't be had. Keeps the reason of the earliest such block."""
        if end < self.end:
            self.end = end
            self.reason = reason

    def first_open(self) -> int | None:
        """The first block of the prefix that is neither here nor known to be absent."""
        have = self.pinned if self.load else self.stored
        while self.had < self.end and self.had in have:
            self.had += 1
        return self.had if self.had < self.end else None

    def is_settled(self) -> bool:
        return not self.head_probes and self.first_open() is None

    def next_probes(self, max_groups: int) -> list[list[int]]:
        """The next groups of the tail to ask storage about; none while others are out, or while
        there is plenty to read. Who asks counts `probes_running`."""
        if self.probes_running or not self.unprobed or self.unprobed[0] >= self.end:
            return []
        if len(self.unread) >= max_groups * PROBE_GROUP or self.missing():
            return []
        if not (self.stored or self.pinned or self.waiting or self.unread):
            groups = [self.unprobed[:FIRST_PROBE]]
        else:
            stop = min(len(self.unprobed), max_groups * PROBE_GROUP)
            groups = [self.unprobed[i : i + PROBE_GROUP] for i in range(0, stop, PROBE_GROUP)]
        del self.unprobed[: sum(len(group) for group in groups)]
        return groups

    def missing(self) -> list[int]:
        """Promised blocks to look for, from the first that is not there yet."""
        if self.all_there or self.probes_running or not self.unprobed:
            return []
        stop = min(self.promised, self.end)
        return [i for i in self.unprobed if i < stop]

    def has_begun(self, i: int) -> bool:
        """It is here, or somebody fills its slot: it came while storage was asked for it."""
        return i in self.pinned or i in self.waiting

    def probe_again(self, blocks: Sequence[int]) -> None:
        for i in blocks:
            insort(self.unprobed, i)

    def no_probe(self, i: int) -> None:
        if i in self.unprobed:
            self.unprobed.remove(i)

    def add_unread(self, blocks: Sequence[int]) -> None:
        for i in blocks:
            heappush(self.unread, i)

    def next_unread(self) -> int | None:
        """The earliest block that storage has and that is still part of the prefix."""
        if not self.unread or self.unread[0] >= self.end:
            self.unread.clear()
            return None
        return heappop(self.unread)
