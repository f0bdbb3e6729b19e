"""What a strand needs and what is kept of it, against attention written out token by token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.store.blocks.strands import (
    ALL,
    STATE,
    Reach,
    ReachKind,
    boundaries,
    default_interval_tokens,
    first_needed_token,
    kept_blocks,
    last_boundary,
    needed_blocks,
)

reaches = st.just(ALL) | st.builds(
    Reach, st.sampled_from([ReachKind.WINDOW, ReachKind.CHUNK]), st.integers(1, 40)
)


def attends(reach: Reach, query: int, key: int) -> bool:
    """Whether the token at `query` attends to the one at `key`."""
    if reach.kind is ReachKind.WINDOW:
        return query - reach.num_tokens < key <= query
    if reach.kind is ReachKind.CHUNK:
        return key <= query and key // reach.num_tokens == query // reach.num_tokens
    return key <= query


@given(reaches, st.integers(0, 120), st.integers(0, 60))
def test_what_is_needed_is_what_the_next_tokens_attend_to(
    reach: Reach, num_tokens: int, further: int
) -> None:
    """The next one needs all of it, and those behind it nothing else."""
    computed = range(num_tokens)
    first = first_needed_token(reach, num_tokens)
    later = num_tokens + further

    assert [key for key in computed if attends(reach, num_tokens, key)] == [*computed[first:]]
    assert all(key >= first for key in computed if attends(reach, later, key))


@given(reaches, st.integers(0, 120), st.integers(1, 20))
def test_needed_blocks_are_whole_and_hold_every_needed_token(
    reach: Reach, num_tokens: int, block_tokens: int
) -> None:
    needed = needed_blocks(reach, num_tokens, block_tokens)
    held = range(needed.start * block_tokens, needed.stop * block_tokens)

    assert set(range(first_needed_token(reach, num_tokens), num_tokens)) <= set(held)
    for block in needed:
        tokens = range(block * block_tokens, min(num_tokens, (block + 1) * block_tokens))
        assert any(attends(reach, num_tokens, token) for token in tokens)
    assert held.stop - num_tokens < block_tokens


@given(
    st.integers(1, 300), st.integers(1, 20), st.booleans(), st.integers(0, 90), st.integers(0, 3)
)
def test_boundaries_are_the_ends_and_lie_an_interval_apart(
    num_prompt: int, block_tokens: int, has_tail: bool, interval: int, unnamed: int
) -> None:
    """`unnamed` blocks at the end can't be stored, whatever they are."""
    whole, rest = divmod(num_prompt, block_tokens)
    num_blocks = max(0, whole + (rest > 0 and has_tail) - unnamed)
    found = boundaries(num_prompt, num_blocks, block_tokens, interval)
    end = min(num_prompt, num_blocks * block_tokens)
    whole_end = end // block_tokens * block_tokens

    assert found == sorted(set(found), reverse=True) and 0 not in found
    assert found[:1] == ([end] if end else [])
    assert whole_end in found or not whole_end
    for each in set(found) - {end, whole_end}:
        assert each % block_tokens == 0
    if interval and found:
        # Rounded up to blocks, so a window of every boundary lies between two of them.
        gaps = [there - here for there, here in zip(found, [*found[1:], 0], strict=True)]
        assert all(gap < interval + block_tokens for gap in gaps)
    else:
        assert set(found) <= {end, whole_end}


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 20), st.integers(1, 90))
def test_prompts_that_begin_alike_have_boundaries_alike(
    short: int, more: int, block_tokens: int, interval: int
) -> None:
    """Where one prompt can be left is where another finds it, whatever follows."""
    ends = {short, short // block_tokens * block_tokens}
    one = boundaries(short, -(-short // block_tokens), block_tokens, interval)
    other = boundaries(short + more, -(-(short + more) // block_tokens), block_tokens, interval)

    assert set(one) - ends <= set(other)


@given(reaches, st.integers(1, 300), st.integers(1, 20), st.integers(0, 90), st.booleans())
def test_kept_blocks_are_those_of_all_boundaries_and_no_other(
    reach: Reach, num_prompt: int, block_tokens: int, interval: int, has_tail: bool
) -> None:
    num_blocks = num_prompt // block_tokens + (num_prompt % block_tokens > 0 and has_tail)
    kept = kept_blocks(reach, num_prompt, num_blocks, block_tokens, interval)
    ends = boundaries(num_prompt, num_blocks, block_tokens, interval)

    assert kept <= set(range(num_blocks))
    if reach is ALL:
        assert kept == set(range(num_blocks))
    for end in ends:
        for go_on_at in (end, end - 1):
            needed = {
                key // block_tokens for key in range(go_on_at) if attends(reach, go_on_at, key)
            }
            assert needed <= kept
    for block in kept:
        assert any(
            block in needed_blocks(reach, go_on_at, block_tokens)
            for end in ends
            for go_on_at in (end, end - 1)
        )


def test_a_window_is_kept_one_token_longer_than_its_boundary_needs() -> None:
    """129 at 1024: who goes on at 1023, as the whole prompt is known, needs token 895."""
    window = Reach(ReachKind.WINDOW, 129)

    assert needed_blocks(window, 1024, 128) == range(7, 8)
    assert kept_blocks(window, 1024, 8, 128, 0) == {6, 7}


def test_a_chunk_is_kept_for_those_who_end_with_it() -> None:
    """At its end nothing of it is needed, but for the last token."""
    chunk = Reach(ReachKind.CHUNK, 256)

    assert needed_blocks(chunk, 512, 128) == range(4, 4)
    assert kept_blocks(chunk, 512, 4, 128, 0) == {2, 3}


@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 90), st.integers(0, 3))
def test_with_states_boundaries_are_ends_of_blocks_that_leave_a_token_to_compute(
    num_prompt: int, block_tokens: int, interval: int, unnamed: int
) -> None:
    num_blocks = max(0, num_prompt // block_tokens - unnamed)
    found = boundaries(num_prompt, num_blocks, block_tokens, interval, with_states=True)
    last = last_boundary(num_prompt, num_blocks, block_tokens, with_states=True)

    assert found[:1] == ([last] if last else [])
    assert all(end % block_tokens == 0 and 0 < end < num_prompt for end in found)
    assert last + block_tokens >= min(num_prompt, (num_blocks + 1) * block_tokens)
    kept = kept_blocks(STATE, num_prompt, num_blocks, block_tokens, interval, with_states=True)
    assert kept == {end // block_tokens - 1 for end in found}
    for end in found:
        # One state, of exactly so many tokens.
        assert needed_blocks(STATE, end, block_tokens) == range(
            end // block_tokens - 1, end // block_tokens
        )


def test_few_blocks_of_a_long_prompt_are_kept() -> None:
    """Of a window of 1024 tokens half, if it is kept every 2048."""
    window = Reach(ReachKind.WINDOW, 1024)
    num_tokens = 64 << 10

    assert len(kept_blocks(window, num_tokens, 512, 128, 2048)) == 512 // 2
    assert len(kept_blocks(window, num_tokens, 512, 128, 0)) == 8


def test_boundaries_are_two_windows_apart_by_default() -> None:
    window, chunk = Reach(ReachKind.WINDOW, 128), Reach(ReachKind.CHUNK, 8192)

    assert default_interval_tokens([ALL]) == default_interval_tokens([]) == 2048
    assert default_interval_tokens([ALL, window]) == 2048
    assert default_interval_tokens([window, ALL, chunk]) == 16384


@pytest.mark.parametrize(
    ("kind", "num_tokens"),
    [
        (ReachKind.ALL, 5),
        (ReachKind.STATE, 1),
        (ReachKind.WINDOW, 0),
        (ReachKind.CHUNK, -1),
    ],
)
def test_a_reach_that_is_none_is_an_error(kind: ReachKind, num_tokens: int) -> None:
    with pytest.raises(ValueError, match="a reach of"):
        Reach(kind, num_tokens)
