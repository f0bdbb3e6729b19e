"""From tokens to the parts of pages that the ranks copy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

from ucm.integration.engine.ranges import part_of_block, parts_of_tokens

BLOCK = 128


@given(
    unit=st.sampled_from([16, 32, 64, 128]),
    start_units=st.integers(0, 40),
    num_tokens=st.integers(1, 1000),
)
def test_parts_cover_exactly_the_device_blocks_of_the_tokens(unit, start_units, num_tokens):
    start, end = start_units * unit, start_units * unit + num_tokens
    device_blocks = [1000 + i for i in range(-(-end // unit))]
    slots = {block: block * 4096 for block in range(-(-end // BLOCK))}

    parts = parts_of_tokens(start, end, slots, device_blocks, block_tokens=BLOCK, unit=unit)

    covered = [
        (part.slot_offset // 4096 * BLOCK + part.first_token + i * unit, block)
        for part in parts
        for i, block in enumerate(part.block_ids)
    ]
    assert covered == [(i * unit, 1000 + i) for i in range(start // unit, -(-end // unit))]
    for part in parts:
        assert part.first_token + len(part.block_ids) * unit <= BLOCK


@given(unit=st.sampled_from([16, 32, 64, 128]), block=st.integers(0, 20))
def test_a_block_is_copied_from_all_of_its_device_blocks(unit, block):
    per_block = BLOCK // unit
    device_blocks = list(range(100, 100 + 21 * per_block))

    part = part_of_block(
        block, 4096, device_blocks, num_tokens=BLOCK, block_tokens=BLOCK, unit=unit
    )

    assert part.block_ids == tuple(range(100 + block * per_block, 100 + (block + 1) * per_block))
    assert (part.slot_offset, part.first_token) == (4096, 0)
