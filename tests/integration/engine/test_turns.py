"""Who waits for a promise holds up nobody who asks, and nobody waits for a turn without an end."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("vllm")

from tests.integration.scheduler_parts import Engine, Loopback
from ucm import handoff as h


def test_hand_offs_that_wait_do_not_hold_up_those_who_ask():
    engine = Engine(Loopback(), max_lookups=2)
    engine.prefill("stored", 100)
    for i in range(5):
        waiting = engine.add(f"w{i}", 100, salt=f"never stored {i}", says=h.Expected())
        assert engine.side.matched_tokens(waiting, 0) == (None, False)

    assert engine.admit(engine.add("asks", 100)) == 96


def test_of_too_many_waiting_hand_offs_the_oldest_is_computed_and_counted():
    engine = Engine(Loopback(), max_handoffs=1)
    first = engine.add("first", 100, salt="a", says=h.Expected())
    second = engine.add("second", 100, salt="b", says=h.Expected())
    assert engine.side.matched_tokens(first, 0) == (None, False)
    assert engine.side.matched_tokens(second, 0) == (None, False)

    assert engine.admit(first) == 0

    assert engine.counted("ucm_handoff_recomputed_tokens", reason="crowded") == 99
    assert engine.side.matched_tokens(second, 0) == (None, False), "it still waits"


def test_a_turn_that_does_not_come_in_time_is_not_waited_for():
    engine = Engine(Loopback(), max_lookups=1, timeout_ms=1)
    engine.link.mute = True
    assert engine.side.matched_tokens(engine.add("asks", 100), 0) == (None, False)
    late = engine.add("late", 100)
    assert engine.side.matched_tokens(late, 0) == (None, False)
    time.sleep(0.005)

    assert engine.side.matched_tokens(late, 0) == (0, False)
    assert engine.counted("ucm_lookup_missed_blocks", reason="timeout") == 6


def test_places_are_free_again_when_lookups_end():
    engine = Engine(Loopback(), max_lookups=1, max_handoffs=1)
    for i in range(3):
        asking = engine.add(f"a{i}", 100, salt=str(i))
        waiting = engine.add(f"w{i}", 100, salt=f"w{i}", says=h.Expected())
        assert engine.side.matched_tokens(asking, 0) == (0, False)
        assert engine.side.matched_tokens(waiting, 0) == (None, False)
        engine.side.finished(asking, [])
        engine.side.finished(waiting, [])
    turns = engine.side._hits._turns
    assert not turns._asking
    assert not turns._waiting
