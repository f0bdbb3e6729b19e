"""What a strand needs, against vLLM's own managers of windows, chunks and states."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    MambaManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from ucm.store.blocks.strands import (
    ALL,
    STATE,
    Reach,
    ReachKind,
    boundaries,
    first_needed_token,
    kept_blocks,
    needed_blocks,
)

GROUP = 0
NUM_BLOCKS = 80
HASHES = [BlockHash(number.to_bytes(32, "big")) for number in range(NUM_BLOCKS)]

# vLLM takes a window of one token for one that a hit of nothing can't fill.
reaches = st.just(ALL) | st.builds(
    Reach, st.sampled_from([ReachKind.WINDOW, ReachKind.CHUNK]), st.integers(2, 60)
)
with_states = reaches | st.just(STATE)


class Oracle:
    """vLLM's manager of one group, with a pool of blocks."""

    def __init__(self, reach: Reach, block_tokens: int) -> None:
        shape: dict[str, Any] = {
            "block_size": block_tokens,
            "num_kv_heads": 1,
            "head_size": 8,
            "dtype": torch.float32,
        }
        self.spec, self.kind = {
            ReachKind.ALL: lambda: (FullAttentionSpec(**shape), FullAttentionManager),
            ReachKind.WINDOW: lambda: (
                SlidingWindowSpec(**shape, sliding_window=reach.num_tokens),
                SlidingWindowManager,
            ),
            ReachKind.CHUNK: lambda: (
                ChunkedLocalAttentionSpec(**shape, attention_chunk_size=reach.num_tokens),
                ChunkedLocalAttentionManager,
            ),
            # As vLLM has it with prefix caching.
            ReachKind.STATE: lambda: (
                MambaSpec(
                    block_size=block_tokens,
                    shapes=((1,),),
                    dtypes=(torch.float32,),
                    mamba_cache_mode="align",
                ),
                MambaManager,
            ),
        }[reach.kind]()
        self.block_tokens = block_tokens
        self.pool = BlockPool(2 * NUM_BLOCKS, enable_caching=True, hash_block_size=block_tokens)
        self.manager = self.kind(
            self.spec,
            block_pool=self.pool,
            enable_caching=True,
            kv_cache_group_id=GROUP,
            scheduler_block_size=block_tokens,
        )

    def hit_tokens(self, cached: Iterable[int], num_tokens: int) -> int:
        """The longest hit of at most `num_tokens` with these blocks in vLLM's prefix cache."""
        for block in cached:
            self.pool.cached_block_hash_to_block.insert(
                make_block_hash_with_group_id(HASHES[block], GROUP), self.pool.blocks[block + 1]
            )
        _, found = self.kind.find_longest_cache_hit(
            HASHES,
            num_tokens,
            [GROUP],
            self.pool,
            self.spec,
            drop_eagle_block=False,
            alignment_tokens=self.block_tokens,
        )
        return found

    def real_blocks(self, num_tokens: int) -> set[int]:
        """Where the table of a request has blocks of its own after an external hit."""
        self.manager.add_local_computed_blocks("r", [], 0, num_tokens)
        self.manager.allocate_external_computed_blocks("r", 0, num_tokens)
        table = self.manager.req_to_blocks["r"]
        return {place for place, block in enumerate(table) if not block.is_null}


@given(with_states, st.integers(1, 500))
def test_vllm_skips_what_is_not_needed_and_nothing_else(reach: Reach, num_tokens: int) -> None:
    manager = Oracle(reach, 4).manager

    assert first_needed_token(reach, num_tokens) == manager.get_num_skipped_tokens(num_tokens)


@given(with_states, st.integers(1, 300), st.integers(4, 20))
def test_an_external_hit_is_given_blocks_exactly_where_some_are_needed(
    reach: Reach, num_tokens: int, block_tokens: int
) -> None:
    needed = needed_blocks(reach, num_tokens, block_tokens)

    assert Oracle(reach, block_tokens).real_blocks(num_tokens) == set(needed)


@given(with_states, st.integers(1, 60), st.integers(1, 20), st.data())
def test_vllm_takes_a_hit_with_the_needed_blocks_and_none_with_one_less(
    reach: Reach, num_blocks: int, block_tokens: int, data: st.DataObject
) -> None:
    num_tokens = num_blocks * block_tokens
    needed = set(needed_blocks(reach, num_tokens, block_tokens))

    assert Oracle(reach, block_tokens).hit_tokens(needed, num_tokens) == num_tokens
    if needed:
        missing = data.draw(st.sampled_from(sorted(needed)))
        assert Oracle(reach, block_tokens).hit_tokens(needed - {missing}, num_tokens) < num_tokens


@given(reaches, st.integers(1, 300), st.integers(4, 20), st.integers(0, 150))
def test_vllm_goes_on_at_every_boundary_with_what_is_kept(
    reach: Reach, num_prompt: int, block_tokens: int, interval: int
) -> None:
    """By its own prefix cache where that ends with a block, and by an external hit one before."""
    num_blocks = -(-num_prompt // block_tokens)
    kept = kept_blocks(reach, num_prompt, num_blocks, block_tokens, interval)

    for end in boundaries(num_prompt, num_blocks, block_tokens, interval):
        for go_on_at in {end, end - 1} - {0}:
            assert Oracle(reach, block_tokens).real_blocks(go_on_at) <= kept
        if end % block_tokens == 0:
            assert Oracle(reach, block_tokens).hit_tokens(kept, end) == end


@given(st.integers(1, 300), st.integers(4, 20), st.integers(0, 9))
def test_of_states_those_are_expected_that_vllm_keeps(
    num_prompt: int, block_tokens: int, blocks_apart: int
) -> None:
    """At the interval of its flag, and at the last end of a block that leaves a token."""
    num_blocks = num_prompt // block_tokens
    interval = blocks_apart * block_tokens
    mask = MambaManager.reachable_block_mask(
        0,
        num_blocks,
        block_tokens,
        Oracle(STATE, block_tokens).spec,
        use_eagle=False,
        retention_interval=interval,
        reachable_boundaries=[num_prompt - 1],
    )
    of_vllm = {block for block in range(num_blocks) if mask is None or mask[block]}
    ours = kept_blocks(STATE, num_prompt, num_blocks, block_tokens, interval, with_states=True)

    # One that leaves no token to compute is for longer prompts.
    assert ours == {block for block in of_vllm if (block + 1) * block_tokens < num_prompt}


@given(st.integers(1, 300), st.integers(4, 20), st.integers(0, 9))
def test_vllm_goes_on_at_every_boundary_with_the_state_that_is_kept(
    num_prompt: int, block_tokens: int, blocks_apart: int
) -> None:
    num_blocks, interval = num_prompt // block_tokens, blocks_apart * block_tokens
    kept = kept_blocks(STATE, num_prompt, num_blocks, block_tokens, interval, with_states=True)
    ends = boundaries(num_prompt, num_blocks, block_tokens, interval, with_states=True)

    for end in ends:
        assert Oracle(STATE, block_tokens).hit_tokens(kept, end) == end < num_prompt
        assert Oracle(STATE, block_tokens).real_blocks(end) <= kept
    # And never behind the last, whatever it could have.
    assert Oracle(STATE, block_tokens).hit_tokens(kept, num_prompt - 1) == max(ends, default=0)
