"""What one lookup knows of each block of its prompt, and who waits for which page. Pure: no I/O.

A lookup starts with its whole prompt and only ever shortens it: `end` falls to the first block that
turns out to be absent, corrupt, late, or without room. It is settled when every block before `end`
is there. The head [0, read_from) is the client's own; each of the others is in one state:

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
from collections.abc import Callable, Sequence
from enum import IntEnum

from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.io_threads import LanePool
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


_OUT, _UNKNOWN, _ASKED, _STORED, _COMING, _HERE = BlockState
# Does a lookup wait for a block that is promised, by its state?
_WAITS_IF_PROMISED = (False, True, True, False, True, False)


class Waiting:
    """Who waits for which key, in the order in which they came. Only lookups change it."""

    def __init__(self) -> None:
        self._by_key: dict[Key, list[tuple[LookupJob, int]]] = {}

    def of(self, key: Key) -> list[tuple[LookupJob, int]]:
        """The lookups, each with the number of the block that it waits for."""
        return list(self._by_key.get(key, ()))

    def add(self, job: LookupJob, i: int) -> None:
        self._by_key.setdefault(job.keys[i], []).append((job, i))

    def discard(self, job: LookupJob, i: int) -> None:
        key = job.keys[i]
        left = self._by_key[key]
        left.remove((job, i))
        if not left:
            del self._by_key[key]

    def check(self, jobs: Sequence[LookupJob]) -> None:
        """Raises AssertionError unless exactly those wait whose states say so."""
        said = [waiter for waiters in self._by_key.values() for waiter in waiters]
        wait = {(job, i) for job in jobs for i in range(len(job.keys)) if job.waits(i)}
        assert set(said) == wait and len(said) == len(wait), (
            "who waits for a page is in a state that waits, once"
        )


class LookupJob:
    """One lookup, from its message to its answer. `promised`: of so many leading blocks those that
    storage lacks stay UNKNOWN until the deadline, and are looked for (`promised_pages.py`)."""

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
        # Blocks that are read for this lookup, and were for nobody before it.
        self.begun: set[int] = set()
        # Seconds in which storage has worked for it (`read_times.py`).
        self.read_s = 0.0
        # What reading costs: None once `weigh.py` has decided what is read, and how many blocks are
        # not although they are there. Until then what lies before `worth_end` may be.
        self.costs = message.costs if message.load else None
        self.refused = 0
        self.worth_end = self.read_from
        self.probes_running = 0
        # By the pool that has them.
        self.reads_running: Counter[LanePool] = Counter()
        # The last promised block is in storage, so it has them all.
        self.all_there = False
        # An engine of this node brings pages.
        self.is_fed = False
        # Pinned slots by block.
        self._pinned: list[Slot | None] = [None] * len(self.keys)
        self._slots = slots
        self._waiting = waiting
        self._clock = clock
        self._states = [BlockState.OUT] * len(self.keys)
        self._num_stored = 0
        # No block before these is in that state.
        self._first_unknown = self._first_stored = 0
        # Anything behind the head was found, here or in storage.
        self._has_found = False
        # Every block of [read_from, had) is there. Only grows, so that the pages of a long prompt,
        # which come in one by one, are not counted from the start each time.
        self._had = self.read_from

    # -- questions -------------------------------------------------------------------------

    def state(self, i: int) -> BlockState:
        return self._states[i]

    def waits(self, i: int) -> bool:
        state = self._states[i]
        return _WAITS_IF_PROMISED[state] if i < self.promised else state is _COMING

    def is_wanted(self, i: int) -> bool:
        """It is promised, and nobody is bringing it yet."""
        return i < self.promised and self._states[i] in (_UNKNOWN, _ASKED)

    def first_open(self) -> int | None:
        """The first block of the prefix that is not there, as far as the client needs it there."""
        enough = _HERE if self.load else _STORED
        states, had, end = self._states, self._had, self.end
        while had < end and (states[had] is _HERE or states[had] is enough):
            had += 1
        self._had = had
        return had if had < end else None

    def is_settled(self) -> bool:
        return not self.head_probes and self.first_open() is None

    def unknown(self, *, most: int, stop: int | None = None) -> list[int]:
        """The first blocks of the prefix, before `stop`, that storage must be asked for."""
        found: list[int] = []
        stop = self.end if stop is None else min(stop, self.end)
        i = self._first_unknown = self._next(_UNKNOWN, self._first_unknown, stop)
        while i < stop and len(found) < most:
            found.append(i)
            i = self._next(_UNKNOWN, i + 1, stop)
        return found

    def next_unread(self) -> int | None:
        """The earliest block to read: storage has it, and it is still part of the prefix."""
        if not self.load or not self._num_stored:
            return None
        i = self._first_stored = self._next(_STORED, self._first_stored, self.end)
        return i if i < (self.end if self.costs is None else self.worth_end) else None

    def missing(self) -> list[int]:
        """The first promised blocks to look for."""
        if self.all_there or self.probes_running:
            return []
        return self.unknown(most=FIRST_PROBE, stop=self.promised)

    def next_probes(self, max_groups: int) -> list[list[int]]:
        """The next groups of blocks to ask storage about; none while others are out, or while
        there is plenty to read. Who asks counts `probes_running`."""
        # What it is not decided about is not being read, however much there is.
        num_unread = self._num_stored if self.load and self.costs is None else 0
        if self.probes_running or num_unread >= max_groups * PROBE_GROUP or self.missing():
            return []
        if not self._has_found or not self.load:
            most = max_groups * PROBE_GROUP if self._has_found else FIRST_PROBE
            blocks = self.unknown(most=most)
            return [blocks[i : i + PROBE_GROUP] for i in range(0, len(blocks), PROBE_GROUP)]
        return self._growing_groups(max_groups)

    def _growing_groups(self, max_groups: int) -> list[list[int]]:
        """Each is twice as long as all that is before it. What is to be read is asked for by order,
        a few questions a group however long it is: so questions grow with the logarithm of the
        prompt, and what is to be read first is known first."""
        blocks = self.unknown(most=self.end)
        groups: list[list[int]] = []
        start = 0
        while start < len(blocks) and len(groups) < max_groups:
            length = max(PROBE_GROUP, 2 * (blocks[start] - self.read_from))
            groups.append(blocks[start : start + length])
            start += length
        return groups

    def _next(self, state: BlockState, start: int, stop: int) -> int:
        """The first block of [start, stop) in `state`; what follows the last of them if none is."""
        try:
            return self._states.index(state, start, stop)
        except ValueError:
            return max(start, stop)

    def slots(self) -> list[Slot]:
        """The pinned slots of the prefix, in order."""
        pinned = self._pinned[self.read_from : self.end]
        return [slot for slot in pinned if slot is not None]

    def last_pinned(self) -> int | None:
        """The last block that is pinned."""
        return next((i for i in reversed(range(self.end)) if self._pinned[i] is not None), None)

    # -- what happens to a block -----------------------------------------------------------

    def not_in_memory(self, i: int) -> None:
        self._move(i, _UNKNOWN)

    def ask(self, blocks: Sequence[int]) -> None:
        """Storage is asked for these."""
        for i in blocks:
            self._move(i, _ASKED)

    def in_storage(self, blocks: Sequence[int]) -> None:
        """Some may have come another way meanwhile."""
        for i in blocks:
            if self._states[i] in (_UNKNOWN, _ASKED):
                self._has_found = True
                self._move(i, _STORED)

    def not_in_storage(self, blocks: Sequence[int]) -> None:
        """Not yet: they are looked for again."""
        self.all_there = False
        for i in blocks:
            if self._states[i] is _ASKED:
                self._move(i, _UNKNOWN)

    def comes(self, i: int, *, is_fed: bool = False) -> None:
        """Somebody fills its slot; with `is_fed` an engine of this node."""
        self.is_fed = self.is_fed or is_fed
        self._has_found = True
        self._move(i, _COMING)

    def does_not_come(self, i: int) -> None:
        """Its slot was given up, and another one may bring it."""
        self.all_there = self.is_fed = False
        self._move(i, _UNKNOWN)

    def here(self, i: int, slot: Slot, *, from_files: bool = False) -> None:
        """The READY `slot` has it. Pinned, if it is to be loaded, and something leads to it."""
        if i >= self.end:
            self._drop(i)
            return
        self.from_files += from_files
        self._has_found = True
        if self.load:
            assert self._pinned[i] is None, "a lookup holds a page once"
            self._slots.pin(slot)
            self._pinned[i] = slot
            if self.renewal_s:
                self.deadline_s = self._clock() + self.renewal_s
        self._move(i, _HERE)

    def lose(self, i: int, reason: Outcome) -> None:
        """It can't be had. Keeps the reason of the earliest such block."""
        if i < self.end:
            self.end = i
            self.reason = reason
        self._drop(i)

    def close(self, *, keep: int) -> None:
        """Answered, or withdrawn: has and waits for nothing from block `keep` on."""
        self.closed = True
        self.end = min(self.end, keep)
        # Tail first: the head of a prompt is shared by more prompts and should be evicted last.
        for i in range(len(self._states) - 1, keep - 1, -1):
            if self._states[i] is not _OUT:
                self._drop(i)

    def _drop(self, i: int) -> None:
        slot, self._pinned[i] = self._pinned[i], None
        if slot is not None:
            self._slots.unpin(slot)
        self._move(i, _OUT)

    def _move(self, i: int, state: BlockState) -> None:
        """All that changes the state of a block."""
        was = self._states[i]
        self._states[i] = state
        if was is _STORED:
            self._num_stored -= 1
        if state is _UNKNOWN:
            if i < self._first_unknown:
                self._first_unknown = i
        elif state is _STORED:
            self._num_stored += 1
            if i < self._first_stored:
                self._first_stored = i
        if i < self.promised:
            waits, has_waited = _WAITS_IF_PROMISED[state], _WAITS_IF_PROMISED[was]
        else:
            waits, has_waited = state is _COMING, was is _COMING
        if waits is not has_waited:
            (self._waiting.add if waits else self._waiting.discard)(self, i)

    # -- the law ---------------------------------------------------------------------------

    def check(self) -> None:
        """Raises AssertionError with the broken sentence if an invariant of this module fails."""
        states, others = self._states, range(self.read_from, len(self.keys))
        assert all(states[i] is not _OUT for i in others if i < self.end), (
            "every block of the prefix is looked for"
        )
        assert self._num_stored == states.count(_STORED), "the stored are counted"
        for state, first in (_UNKNOWN, self._first_unknown), (_STORED, self._first_stored):
            assert state not in states[: min(first, self.end)], "none of these lies before"
        assert set(states[: self.read_from]) <= {_OUT}, "the head is the client's own"
        pinned = {i for i in others if states[i] is _HERE} if self.load else set()
        assert {i for i, slot in enumerate(self._pinned) if slot is not None} == pinned, (
            "what is here to be loaded is pinned, and nothing else"
        )
        for i in others:
            slot, pin = self._slots.find(self.keys[i]), self._pinned[i]
            is_filling = slot is not None and slot.state is SlotState.FILLING
            assert states[i] is not _COMING or is_filling, "what comes is being filled"
            assert pin is None or (pin is slot and pin.pins > 0), "a pin is on its block's page"
        assert not (self.closed and any(map(self.waits, others))), "who has ended waits for nothing"
