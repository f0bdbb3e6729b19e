"""One lookup's blocks, whatever happens to them: what it says of them is what a walk says."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.parts.node import NAMESPACE, PAGE, key
from ucm.outcome import Outcome
from ucm.store.node import protocol as p
from ucm.store.node.lookup_state import FIRST_PROBE, BlockState, LookupJob, Waiting
from ucm.store.node.sessions import Connection, OpenedNamespace, Session
from ucm.store.node.slots import SlotTable

NUM_BLOCKS = 12
KEYS = [key(i) for i in range(NUM_BLOCKS)]
BEGUN = (BlockState.COMING, BlockState.HERE)
MOVES = st.lists(
    st.tuples(
        st.sampled_from(["ask", "stored", "not stored", "comes", "given up", "here", "lose"]),
        st.integers(0, NUM_BLOCKS - 1),
    ),
    max_size=60,
).map(lambda moves: [each for move in moves for each in _with_begin(move)])


def _with_begin(move: tuple[str, int]) -> list[tuple[str, int]]:
    """What ends has begun: by chance alone that is too seldom so."""
    return [("comes", move[1]), move] if move[0] in ("given up", "here") else [move]


class Lookup:
    def __init__(self, *, read_from: int, promised: int, load: bool) -> None:
        self.slots = SlotTable(NUM_BLOCKS * PAGE, extent_bytes=PAGE)
        self.waiting = Waiting()
        message = p.Lookup(
            id=1,
            ns=1,
            keys=list(KEYS),
            read_from=read_from,
            load=load,
            timeout_ms=1000,
            promised=promised,
        )
        self.job = LookupJob(
            Connection(send=lambda message: None, session=Session("s"), role="scheduler"),
            OpenedNamespace(tier=NAMESPACE, slot_bytes=PAGE, block_tokens=4),
            message,
            slots=self.slots,
            waiting=self.waiting,
            clock=lambda: 0.0,
        )
        for i in range(read_from, NUM_BLOCKS):
            self.job.not_in_memory(i)

    def move(self, move: str, i: int) -> None:
        """What may happen to block `i` in the state that it is in; else nothing."""
        job, state = self.job, self.job.state(i)
        if move == "ask" and state is BlockState.UNKNOWN:
            job.ask([i])
        elif move == "stored":
            job.in_storage([i])
        elif move == "not stored":
            job.not_in_storage([i])
        elif move == "comes" and state is not BlockState.OUT and state not in BEGUN and job.load:
            self.slots.reserve(KEYS[i], PAGE)
            job.comes(i)
        elif move in ("given up", "here") and state is BlockState.COMING:
            slot = self.slots.find(KEYS[i])
            assert slot is not None
            if move == "here":
                self.slots.ready(slot)
                job.here(i, slot)
            else:
                self.slots.abandon(slot)
                job.does_not_come(i)
        elif move == "lose" and i >= job.read_from:
            job.lose(i, Outcome.NEVER_STORED)


@given(MOVES, st.integers(0, 3), st.integers(0, NUM_BLOCKS), st.booleans())
def test_what_a_lookup_says_of_its_blocks_is_what_a_walk_over_them_says(
    moves: list[tuple[str, int]], read_from: int, promised: int, load: bool
) -> None:
    lookup = Lookup(read_from=read_from, promised=promised, load=load)
    job = lookup.job
    for move, i in moves:
        lookup.move(move, i)

        job.check()
        lookup.waiting.check([job])
        prefix = range(read_from, job.end)
        states = {i: job.state(i) for i in prefix}
        enough = (BlockState.HERE,) if load else (BlockState.HERE, BlockState.STORED)
        unknown = [i for i in prefix if states[i] is BlockState.UNKNOWN]
        stored = [i for i in prefix if states[i] is BlockState.STORED]
        assert job.first_open() == next((i for i in prefix if states[i] not in enough), None)
        assert job.unknown(most=NUM_BLOCKS) == unknown
        assert job.next_unread() == (stored[0] if stored and load else None)
        if not job.all_there:
            missing = [i for i in unknown if i < job.promised]
            assert job.missing() == missing[:FIRST_PROBE]
        else:
            assert job.missing() == []


@given(MOVES, st.integers(0, NUM_BLOCKS))
def test_a_lookup_that_is_withdrawn_holds_nothing_and_waits_for_nothing(
    moves: list[tuple[str, int]], promised: int
) -> None:
    lookup = Lookup(read_from=0, promised=promised, load=True)
    for move, i in moves:
        lookup.move(move, i)

    lookup.job.close(keep=0)

    lookup.job.check()
    lookup.waiting.check([])
    assert lookup.slots.counts().pins == 0
