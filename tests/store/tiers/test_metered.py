"""A measured tier is a tier, and counts what went through it."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import pytest

from tests.store.tiers.memory_tier import MemoryTier
from tests.store.tiers.tier_contract import (
    ODD,
    SMALL,
    TierContract,
    dump,
    empty_page,
    load,
    make_key,
    make_page,
    run_together,
)
from ucm.errors import TierError
from ucm.store.tiers.metered import MeasuredTier
from ucm.store.tiers.tier import Tier
from ucm.store.tiers.wrapper import WrapperTier


class TestMeasuredTier(TierContract):
    @pytest.fixture
    def tier(self) -> Tier:
        return MeasuredTier(MemoryTier())


def ticking() -> MeasuredTier:
    """Every look at the clock is 2 microseconds after the last, so every call takes as long."""
    return MeasuredTier(MemoryTier(), clock_ns=itertools.count(0, 2000).__next__)


def test_pages_bytes_and_time_are_counted_by_direction() -> None:
    tier = ticking()
    for i in range(3):
        dump(tier, SMALL, make_key(i), make_page(SMALL, i))
    dump(tier, ODD, make_key(9), make_page(ODD, 9))
    tier.read_all(SMALL, [make_key(0), make_key(1)], [empty_page(SMALL) for _ in range(2)])
    load(tier, ODD, make_key(9))

    assert tier.totals() == {
        "tier_write_pages": 4,
        "tier_write_bytes": 3 * SMALL.page_bytes + ODD.page_bytes,
        "tier_write_us": 4 * 2 * 2,  # each page is staged and published
        "tier_write_errors": 0,
        "tier_read_pages": 3,
        "tier_read_bytes": 2 * SMALL.page_bytes + ODD.page_bytes,
        "tier_read_us": 2 * 2,
        "tier_read_errors": 0,
    }


def test_a_damaged_page_is_an_error() -> None:
    tier = ticking()
    dump(tier, SMALL, make_key(1), make_page(SMALL, 1))

    load(tier, replace(SMALL, page_bytes=4 * 4096), make_key(1))

    assert tier.totals()["tier_read_errors"] == 1


def test_calls_that_move_no_page_count_as_time_and_errors_alone() -> None:
    """A slow storage that fails must be seen, and bytes that nobody has must not."""
    tier = ticking()
    load(tier, SMALL, make_key(1))
    dump(tier, SMALL, make_key(2), make_page(SMALL, 2))
    written = tier.totals()
    dump(tier, SMALL, make_key(2), make_page(SMALL, 2))
    staged = tier.stage(SMALL, make_key(3), make_page(SMALL, 3), num_tokens=1)
    assert staged is not None
    tier.discard(staged)
    with pytest.raises(TierError):
        tier.publish(staged)

    assert tier.totals() == {
        **written,
        "tier_write_us": written["tier_write_us"] + 3 * 2,
        "tier_write_errors": 1,
    }
    assert (written["tier_read_pages"], written["tier_read_us"]) == (0, 2)


def test_threads_lose_no_count() -> None:
    tier = MeasuredTier(MemoryTier())
    dump(tier, SMALL, make_key(1), make_page(SMALL, 1))
    start = threading.Barrier(4)

    def read_often() -> None:
        start.wait(30)
        for _ in range(200):
            load(tier, SMALL, make_key(1))

    run_together(*[read_often] * 4)

    assert tier.totals()["tier_read_pages"] == 800


def test_every_call_reaches_the_tier_behind() -> None:
    """A method that the wrapper took from `Tier` would hide the better one of the tier behind."""
    methods = {name for name in vars(Tier) if not name.startswith("_")}

    assert {"read", "read_all", "stage"} <= methods
    assert methods <= vars(WrapperTier).keys()


@pytest.mark.parametrize("is_so", [False, True])
def test_what_is_true_of_the_tier_behind_is_true_of_it(is_so: bool) -> None:
    class Behind(MemoryTier):
        publishes_abreast = is_by_request = is_so

    measured = MeasuredTier(Behind())
    assert (measured.publishes_abreast, measured.is_by_request) == (is_so, is_so)
