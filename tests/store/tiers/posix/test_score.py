"""What a page is worth keeping, as its file's time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ucm.store.tiers.posix.score import (
    MAX_AHEAD_NS,
    MAX_SPAN_NS,
    MIN_SPAN_NS,
    SECOND_NS,
    bounded_score_ns,
    first_score_ns,
    used_score_ns,
)

NOW_NS = 1_700_000_000 * SECOND_NS
MINUTE_NS = 60 * SECOND_NS
times = st.integers(NOW_NS, 2 * NOW_NS)
spans = st.integers(MIN_SPAN_NS, MAX_SPAN_NS)
uses = st.integers(0, 1000)
depths = st.integers(0, 1 << 20)


@given(times, uses, uses, depths, spans)
def test_what_was_used_more_often_is_kept_no_shorter(
    now_ns: int, one: int, other: int, depth: int, span_ns: int
) -> None:
    low, high = sorted((one, other))
    assert first_score_ns(now_ns, uses=low, depth=depth, span_ns=span_ns) <= first_score_ns(
        now_ns, uses=high, depth=depth, span_ns=span_ns
    )


@given(times, uses, depths, depths, spans)
def test_the_end_of_a_prompt_goes_no_later_than_its_beginning(
    now_ns: int, used: int, one: int, other: int, span_ns: int
) -> None:
    near, far = sorted((one, other))
    assert first_score_ns(now_ns, uses=used, depth=far, span_ns=span_ns) <= first_score_ns(
        now_ns, uses=used, depth=near, span_ns=span_ns
    )


def test_what_is_aside_goes_before_what_is_new_and_that_before_what_was_used() -> None:
    aside, new, used = (
        first_score_ns(NOW_NS, uses=n, depth=3, span_ns=MINUTE_NS, is_aside=is_aside)
        for n, is_aside in ((0, True), (0, False), (1, False))
    )
    assert aside < new < NOW_NS < used


@given(times, uses, depths, spans)
def test_what_is_not_used_for_long_goes_before_anything_that_is_used_now(
    now_ns: int, used: int, depth: int, span_ns: int
) -> None:
    """However often it was used: no file is kept for good."""
    old_ns = first_score_ns(now_ns, uses=used, depth=depth, span_ns=span_ns)
    later_ns = now_ns + MAX_AHEAD_NS + 4 * MAX_SPAN_NS
    assert old_ns <= now_ns + MAX_AHEAD_NS
    assert old_ns < first_score_ns(later_ns, uses=0, depth=depth, span_ns=span_ns, is_aside=True)


@given(times, uses, depths, spans)
def test_a_use_is_worth_one_touch(now_ns: int, used: int, depth: int, span_ns: int) -> None:
    first = first_score_ns(now_ns, uses=0, depth=depth, span_ns=span_ns)
    score_ns = used_score_ns(first, now_ns, uses=used, depth=depth, span_ns=span_ns)
    assert score_ns is not None and score_ns > now_ns - 3 * span_ns
    assert used_score_ns(score_ns, now_ns, uses=used, depth=depth, span_ns=span_ns) is None


@given(times, uses, depths, spans)
def test_a_page_in_use_is_touched_again_within_a_sixteenth_of_a_span(
    now_ns: int, used: int, depth: int, span_ns: int
) -> None:
    score_ns = used_score_ns(0, now_ns, uses=used, depth=depth, span_ns=span_ns)
    assert score_ns is not None
    later_ns = now_ns + span_ns // 16 + 1000
    again_ns = used_score_ns(score_ns, later_ns, uses=used, depth=depth, span_ns=span_ns)
    assert again_ns is not None and again_ns > score_ns


def test_a_node_that_knows_of_few_uses_takes_nothing_from_one_that_knows_of_many() -> None:
    of_many = used_score_ns(0, NOW_NS, uses=30, depth=0, span_ns=MINUTE_NS)
    assert of_many is not None
    assert used_score_ns(of_many, NOW_NS + 1, uses=0, depth=0, span_ns=MINUTE_NS) is None


@given(times, uses, depths, spans, st.sampled_from([100, 1000, SECOND_NS, 2 * SECOND_NS]))
def test_coarse_times_keep_uses_apart(
    now_ns: int, used: int, depth: int, span_ns: int, step_ns: int
) -> None:
    """A filesystem that keeps times in steps: one more doubling of uses is not lost, unless a
    span is about a step."""
    few, many = (
        first_score_ns(now_ns, uses=n, depth=depth, span_ns=span_ns) for n in (used % 32, 64)
    )
    if span_ns >= step_ns:
        assert few // step_ns < many // step_ns


@given(times, st.integers(-MAX_AHEAD_NS, 4 * MAX_AHEAD_NS))
def test_a_time_that_is_no_score_counts_as_the_last_change(changed_ns: int, ahead_ns: int) -> None:
    """A clock that was years ahead, or a tool that sets times, makes no file immortal."""
    score_ns = bounded_score_ns(changed_ns + ahead_ns, changed_ns)
    assert score_ns <= changed_ns + MAX_AHEAD_NS + 3600 * SECOND_NS
    assert score_ns in (changed_ns + ahead_ns, changed_ns)
    if ahead_ns <= MAX_AHEAD_NS:
        assert score_ns == changed_ns + ahead_ns
