"""How fast prompts are computed, as the steps of an engine show it."""

from __future__ import annotations

import pytest

from ucm.integration.engine.prefill_meter import MIN_TOKENS, PrefillMeter


class Steps:
    """An engine whose clock the test moves."""

    def __init__(self, max_step_tokens: int = 8192) -> None:
        self.now_s = 100.0
        self.meter = PrefillMeter(max_step_tokens, lambda: self.now_s)

    def step(self, num_tokens: int, seconds: float) -> None:
        number = self.meter.begin(num_tokens)
        self.now_s += seconds
        if number:
            self.meter.ended(number)


def test_the_speed_of_prompts_is_known_after_a_few_steps() -> None:
    steps = Steps()
    steps.step(2048, 60.0)  # it warms up
    for _ in range(3):
        assert steps.meter.token_s() is None
        steps.step(2048, 0.5)
    assert steps.meter.token_s() == pytest.approx(0.5 / 2048)


def test_idle_time_and_steps_that_decode_say_nothing() -> None:
    steps = Steps()
    for _ in range(5):
        steps.step(2048, 0.5)
        steps.now_s += 1000
        steps.step(MIN_TOKENS - 1, 0.3)
        steps.step(0, 0.2)
    assert steps.meter.token_s() == pytest.approx(0.5 / 2048)


def test_a_step_that_was_planned_while_another_ran_began_when_that_ended() -> None:
    steps = Steps()
    numbers = [steps.meter.begin(2048)]
    for _ in range(6):
        numbers.append(steps.meter.begin(2048))
        steps.now_s += 0.5
        steps.meter.ended(numbers.pop(0))
    assert steps.meter.token_s() == pytest.approx(0.5 / 2048)


def test_an_engine_with_small_steps_is_measured_by_what_it_has() -> None:
    steps = Steps(max_step_tokens=64)
    for _ in range(5):
        steps.step(64, 0.5)
    assert steps.meter.token_s() == pytest.approx(0.5 / 64)


def test_steps_whose_end_nobody_reports_are_forgotten() -> None:
    steps = Steps()
    for _ in range(10_000):
        steps.meter.begin(2048)
    assert len(steps.meter._open) <= 64
    steps.meter.ended(1)
    assert steps.meter.token_s() is None
