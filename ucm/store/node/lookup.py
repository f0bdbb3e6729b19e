"""What one lookup knows of each block of its prompt, and who waits for which page. Pure: no I/O.

A lookup starts with its whole prompt and only ever shortens it: `end` falls to the first block that
turns out to be absent, corrupt, late, or without room. It is settled when every block before `end`
is there. The head [0, read_from) is the client's own; each block of the tail is in one state:

    UNKNOWN ──► ASKED ──► STORED ──► COMING ──► HERE
       ▲  └───────┴──────────┴─────────►│└──► OUT
       └────────────────────────────────┘

UNKNOWN  not in this node's memory. Storage is to be asked for it.
ASKED    storage is being asked.
STORED   storage has it, and nobody has begun to read it for this lookup.
COMING   its slot is being filled, from storage or by an engine.
HERE     in memory, and pinned if the client is to load it.
OUT      nobody is to bring it: it is of the head, or can't be had, or lies behind what can't.

Who waits for a page follows from the states, so nobody keeps it by hand: a lookup waits for what is
COMING, and for what is promised and UNKNOWN or ASKED, because an engine of this node may bring it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum

from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.pool import Pool
from ucm.store.node.sessions import Connection, OpenedNamespace
from ucm.store.node.slots import Slot, SlotState, SlotTable

FIRST_PROBE = 8
PROBE_GROUP = 16


class BlockState(IntEnum):
    """See the text of this module."""

    OUT = 0
    UNKNOWN = 1
    ASKED = 2
    STORED = 3
    COMING = 4
    HERE = 5


# By state: does the lookup wait for the page?
_WAITS = (False, False, False, False, True, False)
_WAITS_IF_PROMISED = (False, True, True, False, True, False)


class Waiting:
    """Who waits for which key, in the order in which they came. Only lookups change it."""

    def __init__(self) -> None:
        self._by_key: dict[Key, dict[tuple[LookupJob, int], None]] = {}

    def of(self, key: Key) -> list[tuple[LookupJob, int]]:
        """The lookups, each with the number of the block that it waits for."""
        return list(self._by_key.get(key, ()))

    def add(self, job: LookupJob, i: int) -> None:
        self._by_key.setdefault(job.keys[i], {})[job, i] = None

    def discard(self, job: LookupJob, i: int) -> None:
        key = job.keys[i]
        left = self._by_key[key]
        del left[job, i]
        if not left:
            del self._by_key[key]

    def check(self, jobs: Sequence[LookupJob]) -> None:
        """Raises AssertionError unless exactly those wait whose states say so."""
        said = {(job, i) for waiters in self._by_key.values() for job, i in waiters}
        assert said == {(job, i) for job in jobs for i in range(len(job.keys)) if job.waits(i)}, (
            "who waits for a page is in a state that waits"
        )


class LookupJob:
    """One lookup, from its message to its answer. `promised`: of so many leading blocks those that
    storage lacks stay UNKNOWN until the deadline, and are looked for (`looks.py`)."""

    def __init__(
        self,
        connection: Connection,
        namespace: OpenedNamespace,
        message: p.Lookup,
        *,
        slots: SlotTable,
        waiting: Waiting,
        clock: Callable[[], float],
    ) -> None:
        self.id = message.id
        self.connection = connection
        self.namespace = namespace
        self.keys: Sequence[Key] = p.keys_of(message)
        self.read_from = message.read_from
        self.load = message.load
        self.promised = message.promised if message.load else 0
        self.deadline_s = clock() + message.timeout_ms / 1000
        # Seconds by which each page that comes puts off the deadline.
        self.renewal_s = message.timeout_ms / 1000 if message.renewed else 0.0
        self.end = len(self.keys)
        self.reason = Outcome.FINE
        self.closed = False
        self.head_stored = 0
        self.head_probes = 0
        self.from_files = 0
        self.probes_running = 0
        # By the pool that has them.
        self.reads_running: Counter[Pool] = Counter()
        # The last promised block is in storage, so it has them all.
        self.all_there = False
        # An engine of this node brings pages.
        self.is_fed = False
        self.pinned: dict[int, Slot] = {}
        self._slots = slots
        self._waiting = waiting
        self._clock = clock
        self._states = [BlockState.OUT] * len(self.keys)
        self._count = [0] * len(BlockState)
        # No block before this one is in that state.
        self._first = [0] * len(BlockState)
        # Every block of [read_from, had) is there. Only grows, so that the pages of a long prompt,
        # which come in one by one, are not counted from the start each time.
        self._had = self.read_from

    # -- questions -------------------------------------------------------------------------

    def state(self, i: int) -> BlockState:
        return self._states[i]

    def waits(self, i: int) -> bool:
        return (_WAITS_IF_PROMISED if i < self.promised else _WAITS)[self._states[i]]

    def is_wanted(self, i: int) -> bool:
        """It is promised, and nobody is bringing it yet."""
        return i < self.promised and self._states[i] in (BlockState.UNKNOWN, BlockState.ASKED)

    def first_open(self) -> int | None:
        """The first block of the prefix that is not there, as far as the client needs it there."""
        enough = BlockState.HERE if self.load else BlockState.STORED
        states, had = self._states, self._had
        while had < self.end and (states[had] is BlockState.HERE or states[had] is enough):
            had += 1
        self._had = had
        return had if had < self.end else None

    def is_settled(self) -> bool:
        return not self.head_probes and self.first_open() is None

    def unknown(self) -> Iterator[int]:
        """The blocks of the prefix that storage must be asked for."""
        return self._in_state(BlockState.UNKNOWN, self.end)

    def next_unread(self) -> int | None:
        """The earliest block to read: storage has it, and it is still part of the prefix."""
        return next(self._in_state(BlockState.STORED, self.end), None) if self.load else None

    def missing(self) -> list[int]:
        """The first promised blocks to look for."""
        if self.all_there or self.probes_running:
            return []
        unknown = self._in_state(BlockState.UNKNOWN, min(self.promised, self.end))
        return [i for i, _ in zip(unknown, range(FIRST_PROBE), strict=False)]

    def next_probes(self, max_groups: int) -> list[list[int]]:
        """The next groups of the tail to ask storage about; none while others are out, or while
        there is plenty to read. Who asks counts `probes_running`."""
        num_unread = self._count[BlockState.STORED] if self.load else 0
        if self.probes_running or num_unread >= max_groups * PROBE_GROUP or self.missing():
            return []
        there = BlockState.STORED, BlockState.COMING, BlockState.HERE
        is_first = not any(self._count[state] for state in there)
        most = FIRST_PROBE if is_first else max_groups * PROBE_GROUP
        blocks = [i for i, _ in zip(self.unknown(), range(most), strict=False)]
        return [blocks[i : i + PROBE_GROUP] for i in range(0, len(blocks), PROBE_GROUP)]

    # -- what happens to a block -----------------------------------------------------------

    def not_in_memory(self, i: int) -> None:
        self._move(i, BlockState.UNKNOWN)

    def ask(self, blocks: Sequence[int]) -> None:
        """Storage is asked for these."""
        for i in blocks:
            self._move(i, BlockState.ASKED)

    def in_storage(self, blocks: Sequence[int]) -> None:
        """Some may have come another way meanwhile."""
        for i in blocks:
            if self._states[i] in (BlockState.UNKNOWN, BlockState.ASKED):
                self._move(i, BlockState.STORED)

    def not_in_storage(self, blocks: Sequence[int]) -> None:
        """Not yet: they are looked for again."""
        self.all_there = False
        for i in blocks:
            if self._states[i] is BlockState.ASKED:
                self._move(i, BlockState.UNKNOWN)

    def comes(self, i: int, *, is_fed: bool = False) -> None:
        """Somebody fills its slot; with `is_fed` an engine of this node."""
        self.is_fed = self.is_fed or is_fed
        self._move(i, BlockState.COMING)

    def does_not_come(self, i: int) -> None:
        """Its slot was given up, and another one may bring it."""
        self.all_there = self.is_fed = False
        self._move(i, BlockState.UNKNOWN)

    def here(self, i: int, slot: Slot, *, from_files: bool = False) -> None:
        """The READY `slot` has it. Pinned, if it is to be loaded, and something leads to it."""
        if i >= self.end:
            self._drop(i)
            return
        self.from_files += from_files
        if self.load:
            assert i not in self.pinned, "a lookup holds a page once"
            self._slots.pin(slot)
            self.pinned[i] = slot
            if self.renewal_s:
                self.deadline_s = self._clock() + self.renewal_s
        self._move(i, BlockState.HERE)

    def lose(self, i: int, reason: Outcome) -> None:
        """It can't be had. Keeps the reason of the earliest such block."""
        if i < self.end:
            self.end = i
            self.reason = reason
        self._drop(i)

    def close(self, *, keep: int) -> None:
        """Answered, or withdrawn: has and waits for nothing from block `keep` on."""
        self.closed = True
        # Tail first: the head of a prompt is shared by more prompts and should be evicted last.
        for i in range(len(self._states) - 1, keep - 1, -1):
            if self._states[i] is not BlockState.OUT:
                self._drop(i)

    def _drop(self, i: int) -> None:
        if i in self.pinned:
            self._slots.unpin(self.pinned.pop(i))
        self._move(i, BlockState.OUT)

    def _move(self, i: int, state: BlockState) -> None:
        """All that changes the state of a block."""
        was = self._states[i]
        self._states[i] = state
        self._count[was] -= 1
        self._count[state] += 1
        if i < self._first[state]:
            self._first[state] = i
        waits = _WAITS_IF_PROMISED if i < self.promised else _WAITS
        if waits[state] != waits[was]:
            (self._waiting.add if waits[state] else self._waiting.discard)(self, i)

    def _in_state(self, state: BlockState, stop: int) -> Iterator[int]:
        """The blocks before `stop` that are in `state`, in order. Of what changes meanwhile, what
        lies ahead counts."""
        i = self._first[state]
        is_first = True
        while self._count[state]:
            try:
                i = self._states.index(state, i, stop)
            except ValueError:
                return
            if is_first:
                self._first[state], is_first = i, False
            yield i
            i += 1

    # -- the law ---------------------------------------------------------------------------

    def check(self) -> None:
        """Raises AssertionError with the broken sentence if an invariant of this module fails."""
        states, tail = self._states, range(self.read_from, len(self.keys))
        for state in BlockState:
            found = [i for i in tail if states[i] is state]
            if state is BlockState.OUT:
                assert all(i >= self.end for i in found), "every block before the end is looked for"
                continue
            assert self._count[state] == len(found), "the count of each state is that of its blocks"
            assert self._first[state] <= min(found, default=len(states)), "none lies before"
        assert set(states[: self.read_from]) <= {BlockState.OUT}, "the head is the client's own"
        pinned = {i for i in tail if states[i] is BlockState.HERE} if self.load else set()
        assert set(self.pinned) == pinned, "what is here to be loaded is pinned, and nothing else"
        for i, slot in self.pinned.items():
            assert slot.key == self.keys[i], "a pinned slot has the page of its block"
            assert slot.state is SlotState.READY and slot.pins > 0
        for i in tail:
            slot_of = self._slots.find(self.keys[i])
            is_filling = slot_of is not None and slot_of.state is SlotState.FILLING
            assert states[i] is not BlockState.COMING or is_filling, "what comes is being filled"
        assert not (self.closed and any(map(self.waits, tail))), "who has ended waits for nothing"
