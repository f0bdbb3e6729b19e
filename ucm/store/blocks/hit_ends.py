"""Where a hit may end of a model with several strands or with windows: the boundaries that are
worth trying, the longest first. Which of them is the end only the other strands' pages can tell.

All of them are numbers of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Final

from ucm.store.blocks.strands import Reach, last_boundary, needed_blocks

# Of boundaries: each takes an engine a round of messages, and perhaps reads.
MAX_TRIES: Final = 8


def ends_in_base(
    num_prompt: int,
    num_blocks: int,
    block_tokens: int,
    own_ends: Sequence[int],
    *,
    with_states: bool = False,
) -> list[int]:
    """Of a prompt whose base has its first `num_blocks` blocks: the end of these, before all that
    follows, and the prompt's own boundaries, some of which may be longer. Of states, one block
    before as well: that is where one is kept of a prompt that ended here."""
    last = last_boundary(num_prompt, num_blocks, block_tokens, with_states=with_states)
    found = {*own_ends, last - block_tokens} if with_states else {*own_ends}
    return [last, *sorted(found, reverse=True)]


def likely_ends(
    reach: Reach,
    own_ends: Sequence[int],
    *,
    found: AbstractSet[int],
    absent: AbstractSet[int],
    block_tokens: int,
    first_block: int = 0,
) -> list[int]:
    """Without a base: the prompt's own boundaries that need no block that is `absent`, and the ends
    of blocks that are `found` with all that is needed there from `first_block` on."""

    def needed(end: int) -> set[int]:
        return {each for each in needed_blocks(reach, end, block_tokens) if each >= first_block}

    behind_found = {(block + 1) * block_tokens for block in found}
    ends = {end for end in own_ends if needed(end).isdisjoint(absent)}
    ends |= {end for end in behind_found if needed(end) <= found}
    return sorted(ends, reverse=True)


def end_before(ends: Sequence[int], end_tokens: int, *, missing: int, is_plain: bool) -> int:
    """The longest before `end_tokens` that needs nothing from token `missing` on, with which a
    block begins; 0 if there is none. With `is_plain` every strand keeps all, and each block's end
    is one."""
    if is_plain:
        return missing
    return next((end for end in ends if 0 < end <= missing and end < end_tokens), 0)
