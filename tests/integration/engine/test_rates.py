"""What is learnt from how long things took lately."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.integration.engine.rates import MIN_SAMPLES, WINDOW, LoadTime, Recent, Sample, line_through

AMOUNTS = st.floats(1, 10_000)
RATES = st.floats(1e-6, 1.0)
FIRSTS = st.floats(0, 10.0)


def recent(samples: list[tuple[float, float]]) -> Recent:
    made = Recent()
    for amount, seconds in samples:
        made.add(amount, seconds)
    return made


@given(st.lists(st.tuples(AMOUNTS, FIRSTS), max_size=MIN_SAMPLES - 1))
def test_from_too_few_nothing_is_learnt(samples: list[tuple[float, float]]) -> None:
    assert recent(samples).line() is None
    assert recent(samples).each_s() is None


@given(st.lists(st.tuples(AMOUNTS, FIRSTS), min_size=MIN_SAMPLES, max_size=3 * WINDOW))
def test_what_is_learnt_is_never_negative(samples: list[tuple[float, float]]) -> None:
    line, each_s = recent(samples).line(), recent(samples).each_s()
    assert line is not None and each_s is not None
    assert line.first_s >= 0 and line.each_s >= 0 and each_s >= 0


@given(st.lists(AMOUNTS, min_size=MIN_SAMPLES, max_size=WINDOW), RATES)
def test_what_has_one_rate_is_learnt_exactly(amounts: list[float], rate: float) -> None:
    samples = [(amount, amount * rate) for amount in amounts]
    line = recent(samples).line()
    assert line is not None
    assert line.seconds(5000) == pytest.approx(5000 * rate)
    assert recent(samples).each_s() == pytest.approx(rate)


@given(st.floats(0.01, 10.0), RATES)
def test_a_first_byte_that_takes_long_is_told_from_the_others(first_s: float, rate: float) -> None:
    line = recent([(n, first_s + n * rate) for n in (128, 2048) * 4]).line()
    assert line == LoadTime(pytest.approx(first_s, rel=1e-3), pytest.approx(rate, rel=1e-3))


def test_amounts_that_are_alike_say_nothing_of_a_first_byte() -> None:
    line = recent([(1000, 1.0), (1100, 1.0), (1000, 1.0), (1100, 1.0)] * 2).line()
    assert line is not None
    assert line.first_s == 0


@given(
    st.lists(AMOUNTS, min_size=MIN_SAMPLES, max_size=WINDOW),
    RATES,
    st.integers(0, WINDOW - 1),
    st.sampled_from([0.0, 1e-3, 1e3, 1e6]),
)
def test_one_that_is_far_off_changes_nothing(
    amounts: list[float], rate: float, place: int, factor: float
) -> None:
    samples = [Sample(amount, amount * rate) for amount in amounts]
    place %= len(samples)
    samples[place] = Sample(amounts[place], samples[place].seconds * factor)

    line = line_through(samples)

    assert line is not None
    for amount in (min(amounts), max(amounts)):
        assert line.seconds(amount) == pytest.approx(rate * amount)


@given(
    st.lists(st.tuples(AMOUNTS, FIRSTS), max_size=WINDOW),
    st.lists(AMOUNTS, min_size=WINDOW, max_size=WINDOW),
    RATES,
)
def test_a_change_of_rates_is_learnt_within_the_window(
    before: list[tuple[float, float]], amounts: list[float], rate: float
) -> None:
    learnt = recent([*before, *((amount, amount * rate) for amount in amounts)])
    line = learnt.line()
    assert line is not None
    assert line.seconds(1000) == pytest.approx(1000 * rate)
    assert learnt.each_s() == pytest.approx(rate)


@pytest.mark.parametrize("factor", [0.01, 100.0], ids=["faster", "slower"])
def test_more_than_half_of_the_window_decides(factor: float) -> None:
    old = [(1000.0, 1.0)] * WINDOW
    new = [(1000.0, factor)] * (WINDOW // 2 + 1)
    line = recent([*old, *new]).line()
    assert line is not None
    assert line.seconds(1000) == pytest.approx(factor)
    assert recent([*old, *new[:2]]).line() == LoadTime(0.0, 0.001)


def test_small_amounts_say_little_of_the_rate_of_large_ones() -> None:
    """A step of a few tokens takes as long as a step does."""
    samples = [(4096.0, 0.4), (4096.0, 0.4), (4096.0, 0.4), *[(256.0, 0.1)] * 5]
    assert recent(samples).each_s() == pytest.approx(0.4 / 4096)
