"""Is a hit worth its load?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.integration.engine.load_worth import Estimates, read_costs, worth_copying
from ucm.integration.engine.rates import LoadTime
from ucm.store.node.read_worth import worth_reading

BLOCK = 128
SECONDS = st.floats(1e-7, 1e-2)
LINES = st.builds(LoadTime, first_s=st.floats(0, 10), each_s=SECONDS)


@given(st.integers(1, 10_000), st.none() | SECONDS, st.none() | LINES, st.none() | LINES)
def test_before_there_are_estimates_everything_is_loaded(
    num_tokens: int, compute_s: float | None, copy: LoadTime | None, read: LoadTime | None
) -> None:
    estimates = Estimates(compute_s, copy, read)
    if compute_s is None or copy is None:
        assert worth_copying(num_tokens, estimates)
    if compute_s is None or read is None:
        assert read_costs(estimates, block_tokens=BLOCK) is None


@given(st.integers(1, 200), SECONDS, st.none() | LINES, LINES)
def test_files_are_read_only_if_that_and_the_copy_take_less_than_computing(
    num_blocks: int, compute_s: float, copy: LoadTime | None, read: LoadTime
) -> None:
    costs = read_costs(Estimates(compute_s, copy, read), block_tokens=BLOCK)
    assert costs is not None

    taken = worth_reading([True] * num_blocks, costs)

    tokens = num_blocks * BLOCK
    copy_s = copy.each_s * tokens if copy is not None else 0.0
    load_s = read.seconds(tokens) + copy_s
    if load_s < 0.99 * compute_s * tokens:
        assert taken == num_blocks
    if load_s > 1.01 * compute_s * tokens:
        assert taken == 0


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_storage_at_a_tenth_of_the_speed_of_computing_is_left_alone_and_the_reverse_used(
    factor: float,
) -> None:
    estimates = Estimates(0.001, None, LoadTime(0.0, 0.001 * factor))
    costs = read_costs(estimates, block_tokens=BLOCK)
    assert costs is not None
    taken = worth_reading([True] * 27, costs)
    assert taken == (27 if factor < 1 else 0)


def test_a_copy_that_is_slower_than_computing_is_not_made_and_nothing_read_for_it() -> None:
    estimates = Estimates(0.001, LoadTime(0.0, 0.002), LoadTime(0.0, 0.0001))
    assert not worth_copying(1000, estimates)
    costs = read_costs(estimates, block_tokens=BLOCK)
    assert costs is not None
    assert worth_reading([True] * 50, costs) == 0
    assert worth_reading([False] * 5 + [True] * 5, costs) == 5  # as far as it costs no read


def test_a_few_tokens_are_not_worth_what_every_copy_takes() -> None:
    estimates = Estimates(0.001, LoadTime(0.5, 0.0001), None)
    assert not worth_copying(256, estimates)
    assert worth_copying(4096, estimates)
