"""How much of a prompt is worth reading: the best there is, whatever lies where."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.store.node.protocol import ReadCosts
from ucm.store.node.read_worth import worth_reading

PLACES = st.lists(st.booleans(), max_size=30)
# Sums of these are exact.
COSTS = st.builds(
    ReadCosts,
    first=st.integers(0, 80).map(lambda n: n / 8),
    each=st.integers(0, 40).map(lambda n: n / 8),
)


def gain(is_read: list[bool], costs: ReadCosts) -> float:
    reads = sum(is_read)
    return len(is_read) - reads * costs.each - (costs.first if reads else 0)


@given(PLACES, COSTS)
def test_no_prefix_gains_more_and_no_shorter_one_as_much(
    is_read: list[bool], costs: ReadCosts
) -> None:
    count = worth_reading(is_read, costs)

    best = gain(is_read[:count], costs)
    assert all(gain(is_read[:n], costs) < best for n in range(count))
    assert all(gain(is_read[:n], costs) <= best for n in range(count, len(is_read) + 1))


@pytest.mark.parametrize(
    ("is_read", "costs", "count"),
    [
        ([True] * 8, ReadCosts(0, 0.1), 8),
        ([True] * 8, ReadCosts(0, 1.5), 0),
        ([False] * 3 + [True] * 8, ReadCosts(0, 1.5), 3),
        ([True] * 8, ReadCosts(10, 0.1), 0),
        ([True] * 80, ReadCosts(10, 0.1), 80),
        ([True] + [False] * 8, ReadCosts(0, 5), 9),
        ([False, True, True, False], ReadCosts(0, 5), 1),
    ],
    ids=[
        "fast storage",
        "slow storage",
        "the part in memory",
        "a few pages take as long as the first byte",
        "many are worth the wait",
        "one page leads to many in memory",
        "and to too few",
    ],
)
def test_what_is_taken(is_read: list[bool], costs: ReadCosts, count: int) -> None:
    assert worth_reading(is_read, costs) == count
