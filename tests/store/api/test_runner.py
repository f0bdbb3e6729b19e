"""What drives the tasks of the store API, over a real link to a peer that answers when it may."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest

from tests.store.client.test_link import peer
from tests.store.client.test_session import serving, session_of
from tests.store.node.support import SOON_S, Place, make_keys, wait_until
from ucm.errors import TaskFailed
from ucm.outcome import Outcome
from ucm.store.api.questions import Questions, abort
from ucm.store.api.runner import TaskRunner
from ucm.store.api.steps import Ask, Hear, NodeLost, Pause, ReserveTurn, Steps, Tell
from ucm.store.api.tasks import Task
from ucm.store.node import protocol as p

KEYS = make_keys("runner", 2)


def task() -> Task:
    return Task(SOON_S)


def reserving(questions: Questions) -> Steps[list[int]]:
    yield ReserveTurn()
    yield Ask(questions.reserve(KEYS), undo=lambda reply: abort(KEYS))
    reply: p.ReserveReply = yield Hear()
    return reply.offsets


def test_what_a_task_reserves_after_its_end_is_given_back_before_another_reserves(
    place: Place,
) -> None:
    may_answer = threading.Event()
    heard: list[type] = []

    def answer(message: p.ClientMessage) -> list[p.NodeMessage]:
        heard.append(type(message))
        if isinstance(message, p.Reserve):
            may_answer.wait(SOON_S)
            return [p.ReserveReply(id=message.id, offsets=[0, p.HAVE])]
        return []

    with peer(place, serving(place, answer)), closing(session_of(place)) as session:
        runner = TaskRunner(session)
        questions = Questions(session.next_id, time.monotonic() + SOON_S)
        wait_until(lambda: session.poll(0.01) or session.is_met, "it is met")
        late, second = task(), task()
        runner.begin(late, reserving(questions))
        runner.begin(second, reserving(questions))
        runner.go_on()
        runner.fail(late, TaskFailed("it is late"))
        runner.go_on()
        may_answer.set()

        wait_until(
            lambda: session.poll(0.01) or runner.go_on() or second.has_ended, "it has its turn"
        )

    assert heard == [p.OpenNamespace, p.Reserve, p.Abort, p.Reserve]
    assert second.result == [0, p.HAVE]
    with pytest.raises(TaskFailed, match="it is late"):
        late.wait(0)


def test_the_lookups_of_a_task_that_has_ended_are_withdrawn_whether_answered_or_not(
    place: Place,
) -> None:
    heard: list[p.ClientMessage] = []

    def answer(message: p.ClientMessage) -> list[p.NodeMessage]:
        heard.append(message)
        if not isinstance(message, p.Lookup) or message.promised:
            return []
        reply = p.LookupReply(
            id=message.id,
            offsets=[],
            num_stored=0,
            from_files=0,
            head_stored=0,
            reason=Outcome.NEVER_STORED,
        )
        return [reply]

    def asking(questions: Questions) -> Steps[None]:
        first = yield Ask(questions.lookup(KEYS))
        asked.append((yield Ask(questions.lookup(KEYS, promised=2))))
        reply: p.LookupReply = yield Hear()
        assert reply.id == first
        yield Tell(p.Release(lookups=[first]))
        asked.append(first)
        yield Hear()

    asked: list[int] = []
    with peer(place, serving(place, answer)), closing(session_of(place)) as session:
        runner = TaskRunner(session)
        wait_until(lambda: session.poll(0.01) or session.is_met, "it is met")
        ends = task()
        runner.begin(ends, asking(Questions(session.next_id, time.monotonic() + SOON_S)))
        wait_until(lambda: session.poll(0.01) or len(asked) == 2, "one answer")
        runner.fail(ends, TaskFailed("it is late"))
        promised, first = asked

        def released() -> list[int]:
            told = [message.lookups for message in heard if isinstance(message, p.Release)]
            return [each for lookups in told for each in lookups]

        wait_until(lambda: session.poll(0.01) or len(released()) == 2, "both are given back")
    assert released() == [first, promised]


def test_tasks_wait_for_a_node_cache_and_are_told_when_it_is_another_one(place: Place) -> None:
    def answer(message: p.ClientMessage) -> list[p.NodeMessage] | None:
        return None if isinstance(message, p.Reserve) else []

    def staying() -> Steps[str]:
        try:
            yield Pause(SOON_S)
        except NodeLost:
            return "went on"
        return "has not heard"

    with peer(place, serving(place, answer)), closing(session_of(place)) as session:
        runner = TaskRunner(session)
        session.on_lost, session.on_met = runner.node_lost, runner.node_met
        questions = Questions(session.next_id, time.monotonic() + SOON_S)
        stays, fails = task(), task()
        runner.begin(stays, staying())
        runner.begin(fails, reserving(questions))
        runner.go_on()
        assert not session.is_met

        wait_until(
            lambda: session.poll(0.01) or runner.go_on() or stays.has_ended, "another is met"
        )

    assert stays.result == "went on"
    with pytest.raises(NodeLost):
        fails.wait(0)
    assert runner.num_tasks == 0
