"""Work beside the engine's thread: in order, bounded, and never at that thread's cost."""

from __future__ import annotations

import logging
import threading

import pytest

from ucm.integration.engine.side_thread import SideThread


def test_answers_come_in_order_and_the_asker_does_not_wait() -> None:
    goes_on = threading.Event()
    side = SideThread("test")
    first = side.ask(lambda: goes_on.wait(60))
    second = side.ask(lambda: "second")
    assert not first.is_ready and not second.is_ready
    goes_on.set()
    assert second.wait(60)
    assert (first.value, second.value) == (True, "second")


def test_work_that_raises_is_an_answer_without_a_value_and_the_lane_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    side = SideThread("test")

    def broken() -> str:
        raise RuntimeError("of a foreign kind")

    with caplog.at_level(logging.ERROR):
        answer = side.ask(broken)
        assert answer.wait(60) and answer.value is None
    assert "of a foreign kind" in caplog.text
    after = side.ask(lambda: 1)
    assert after.wait(60) and after.value == 1


def test_more_than_its_limit_is_refused_at_once() -> None:
    goes_on, began = threading.Event(), threading.Event()
    side = SideThread("test", limit=2)

    def hangs() -> bool:
        began.set()
        return goes_on.wait(60)

    side.ask(hangs)
    assert began.wait(60)
    waiting = [side.ask(lambda: 1) for _ in range(3)]
    assert [answer.is_ready for answer in waiting] == [False, False, True]
    assert waiting[2].value is None
    goes_on.set()
    assert waiting[1].wait(60) and waiting[1].value == 1


def test_a_lane_that_is_closed_ends_and_answers_nothing_that_waited() -> None:
    goes_on, began = threading.Event(), threading.Event()
    side = SideThread("closing")

    def hangs() -> bool:
        began.set()
        return goes_on.wait(60)

    side.ask(hangs)
    assert began.wait(60)
    waiting = side.ask(lambda: 1)
    side.close()
    goes_on.set()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "closing"]
    thread.join(60)
    assert not thread.is_alive() and not waiting.is_ready
