"""Where a stored prompt ends of which nothing but windows is kept."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ucm.integration.engine.window_search import sampled_blocks
from ucm.store.blocks.hit_ends import likely_ends
from ucm.store.blocks.strands import Reach, ReachKind, boundaries, kept_blocks, needed_blocks

windows = st.builds(Reach, st.just(ReachKind.WINDOW), st.integers(2, 60))


@given(windows, st.integers(1, 200), st.integers(1, 20), st.integers(0, 40), st.integers(0, 30))
def test_wherever_a_prompt_ends_that_begins_alike_some_sample_is_of_its_window(
    reach: Reach, num_tokens: int, block_tokens: int, more_blocks: int, read_from: int
) -> None:
    """A tail is no block of the longer prompt."""
    num_blocks = num_tokens // block_tokens
    (end, *_) = boundaries(num_tokens, num_blocks, block_tokens, 0) or [0]
    needed = set(needed_blocks(reach, end, block_tokens)) - set(range(read_from))
    blocks = range(read_from, max(read_from, num_blocks + more_blocks))
    samples = sampled_blocks(reach, blocks, block_tokens)

    assert set(samples) <= set(blocks)
    assert not needed or needed & set(samples)


@given(windows, st.integers(20, 200), st.integers(1, 20), st.integers(0, 90))
def test_of_all_likely_ends_the_longest_that_is_there_is_where_the_stored_prompt_ended(
    reach: Reach, num_tokens: int, block_tokens: int, more_tokens: int
) -> None:
    num_blocks = num_tokens // block_tokens
    end = num_blocks * block_tokens
    kept = kept_blocks(reach, num_tokens, num_blocks, block_tokens, 0)
    asked = num_tokens + more_tokens
    own_ends = boundaries(asked, asked // block_tokens, block_tokens, 0)
    blocks = range(asked // block_tokens)
    ends = likely_ends(
        reach,
        own_ends,
        found=kept,
        absent=set(blocks) - kept,
        block_tokens=block_tokens,
    )

    assert ends == sorted(set(ends), reverse=True)
    assert (ends or [0])[0] == end
