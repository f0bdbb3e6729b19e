"""What was not worth reading is tried again, beside the requests and not too often."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.parts.node import key
from ucm.integration.engine.explorer import Explorer
from ucm.outcome import Outcome
from ucm.store.node import protocol as p

KEYS = [key(i) for i in range(40)]


class Session:
    """The node cache's side of a session, which answers when the test says so."""

    is_ready = True
    namespace = 1

    def __init__(self) -> None:
        self.now_s = 0.0
        self.asked: list[p.Lookup] = []
        self.released: list[int] = []
        self.heard: list[p.LookupReply] = []
        self.explorer = Explorer(self, self.heard.append, timeout_s=2.0, clock=lambda: self.now_s)

    def next_id(self) -> int:
        return len(self.asked) + 1

    def ask(self, question, on_answer) -> None:
        self.asked.append(question)
        self._on_answer = on_answer

    def release(self, lookup_id: int) -> None:
        self.released.append(lookup_id)

    def sizes(self) -> list[int]:
        """How many pages were tried."""
        return [len(asked.keys) - asked.read_from for asked in self.asked]

    def answer(self, *, seconds: float, reason: Outcome = Outcome.FINE) -> None:
        asked = self.asked[-1]
        count = len(asked.keys) - asked.read_from
        self._on_answer(
            p.LookupReply(
                id=asked.id,
                offsets=[0] * count,
                num_stored=count,
                from_files=count,
                head_stored=0,
                reason=reason,
                read_us=int(seconds * 1e6),
            )
        )


def test_few_pages_and_many_are_tried_by_turns_and_given_back() -> None:
    session = Session()
    for _ in range(7):
        session.explorer.try_again(KEYS, 8)
        session.answer(seconds=0.1)
        session.now_s += 10

    assert session.sizes() == [1, 2, 4, 8, 16, 1, 2]
    assert session.released == [1, 2, 3, 4, 5, 6, 7]
    assert all(asked.read_from == 8 and asked.load for asked in session.asked)
    assert not any(asked.costs for asked in session.asked)
    assert len(session.heard) == 7


def test_where_pages_do_not_come_in_time_one_is_tried() -> None:
    """Each that hangs keeps a thread of storage from others."""
    session = Session()
    for reason in (Outcome.FINE, Outcome.FINE, Outcome.TIMEOUT, Outcome.TIMEOUT, Outcome.FINE):
        session.explorer.try_again(KEYS, 0)
        session.answer(seconds=2.0, reason=reason)
        session.now_s += 20
    assert session.sizes() == [1, 2, 4, 1, 1]


def test_nothing_is_tried_while_another_try_is_under_way_or_nobody_answers() -> None:
    session = Session()
    for _ in range(3):
        session.explorer.try_again(KEYS, 0)
    assert len(session.asked) == 1
    session.now_s += 100  # the answer never came
    session.explorer.try_again(KEYS, 0)
    assert len(session.asked) == 2
    assert session.released == [1]

    session.explorer.node_lost()
    session.is_ready = False
    session.explorer.try_again(KEYS, 0)
    assert len(session.asked) == 2


def test_where_nothing_is_left_to_read_nothing_is_tried() -> None:
    session = Session()
    session.explorer.try_again(KEYS, len(KEYS))
    assert not session.asked


@given(st.lists(st.floats(0.001, 5.0), min_size=1, max_size=20))
def test_tries_take_a_tenth_of_storages_time_at_most(reads_s: list[float]) -> None:
    session = Session()
    busy_s = 0.0
    for read_s in reads_s:
        while len(session.asked) == len(session.released):
            session.now_s += 0.1
            session.explorer.try_again(KEYS, 0)
        session.now_s += read_s
        busy_s += read_s
        session.answer(seconds=read_s)
    before = len(session.asked)
    while len(session.asked) == before:
        session.now_s += 0.1
        session.explorer.try_again(KEYS, 0)
    assert busy_s <= 0.1 * session.now_s + 0.01
