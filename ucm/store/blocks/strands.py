"""Which part of a prompt the layers of a strand need. Pure arithmetic on tokens and blocks.

The layers of a model that need the same part of a prompt, and whose KV has the same shape, are a
*strand*. What its layers need of the tokens that are computed already is its *reach*:

    all        every token
    window W   the last W - 1 tokens: with the next one, W
    chunk C    the tokens since the last multiple of C
    state      a state that holds all of them: that after the last one, and no other

A *boundary* is a number of tokens at which every strand can go on. A prefill writes, of each
strand, the blocks that some boundary needs. With such strands a hit never covers the whole prompt:
the last token must be computed for its answer, and its window reaches one token further back. So a
boundary is kept for those who go on at it, and for those who go on one token before it.

A state can't go one token back, and engines keep it at the ends of whole blocks only. Where there
is one the last boundary is the last end of a block that leaves a token of the prompt to compute.

Blocks are whole ones of the store, the last of a prompt may be its tail. All ranges are half-open.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

# A boundary costs a window of pages, so the distance of boundaries is a small multiple of the
# window; and below this many tokens it is cheaper to compute than to store more.
_LEAST_INTERVAL_TOKENS: Final = 2048


class ReachKind(Enum):
    ALL = "all"
    WINDOW = "window"
    CHUNK = "chunk"
    STATE = "state"


_OF_TOKENS: Final = (ReachKind.WINDOW, ReachKind.CHUNK)


@dataclass(frozen=True, slots=True)
class Reach:
    """`num_tokens` of the window or the chunk; 0 for the others."""

    kind: ReachKind
    num_tokens: int = 0

    def __post_init__(self) -> None:
        if (self.num_tokens < 1) == (self.kind in _OF_TOKENS):
            raise ValueError(f"a reach of {self.num_tokens} tokens can't be of {self.kind}")

    def __str__(self) -> str:
        return f"{self.kind.value} {self.num_tokens}" if self.num_tokens else self.kind.value


def reach_of(text: str) -> Reach:
    """What `str` has made. Raises ValueError for anything else."""
    kind, _, num_tokens = text.partition(" ")
    return Reach(ReachKind(kind), int(num_tokens or 0))


ALL: Final = Reach(ReachKind.ALL)
STATE: Final = Reach(ReachKind.STATE)


def first_needed_token(reach: Reach, num_tokens: int) -> int:
    """With `num_tokens` computed, the next one needs the tokens [this, num_tokens). A state stands
    for its last one."""
    if reach.kind is ReachKind.WINDOW:
        return max(0, num_tokens - reach.num_tokens + 1)
    if reach.kind is ReachKind.CHUNK:
        return num_tokens // reach.num_tokens * reach.num_tokens
    if reach.kind is ReachKind.STATE:
        return max(0, num_tokens - 1)
    return 0


def needed_blocks(reach: Reach, num_tokens: int, block_tokens: int) -> range:
    """The blocks that are needed to go on at `num_tokens`, the one that they end in included. Whole
    ones, as an engine's blocks are: it finds them again in a cache of its own."""
    first, end = first_needed_token(reach, num_tokens), _num_blocks(num_tokens, block_tokens)
    return range(first // block_tokens if first < num_tokens else end, end)


def boundaries(
    num_prompt: int,
    num_blocks: int,
    block_tokens: int,
    interval_tokens: int,
    *,
    with_states: bool = False,
) -> list[int]:
    """The boundaries in a prompt of `num_prompt` tokens whose first `num_blocks` blocks can be
    stored: the end of the last of them (a tail's is that of the prompt) and of the last whole one,
    and every `interval_tokens`, rounded up to blocks; 0 for the ends only. The last one first."""
    end = last_boundary(num_prompt, num_blocks, block_tokens, with_states=with_states)
    found = {end, end // block_tokens * block_tokens}
    if interval_tokens:
        step = _num_blocks(interval_tokens, block_tokens) * block_tokens
        found.update(range(step, end, step))
    return sorted(found - {0}, reverse=True)


def last_boundary(num_prompt: int, num_blocks: int, block_tokens: int, *, with_states: bool) -> int:
    """The longest boundary in so many blocks of a prompt; 0 if there is none."""
    if with_states:
        return min(num_blocks, (num_prompt - 1) // block_tokens) * block_tokens
    return min(num_prompt, num_blocks * block_tokens)


def kept_blocks(
    reach: Reach,
    num_prompt: int,
    num_blocks: int,
    block_tokens: int,
    interval_tokens: int,
    *,
    with_states: bool = False,
) -> frozenset[int]:
    """The blocks of a prompt that a prefill writes: with them one can go on at every boundary, and
    where all can, one token before it."""
    kept: set[int] = set()
    for end in boundaries(
        num_prompt, num_blocks, block_tokens, interval_tokens, with_states=with_states
    ):
        kept.update(needed_blocks(reach, end, block_tokens))
        if not with_states:
            kept.update(needed_blocks(reach, end - 1, block_tokens))
    return frozenset(kept)


def default_interval_tokens(reaches: Iterable[Reach]) -> int:
    """How far apart boundaries are by default: one distance for all strands of an engine, as a
    boundary that one of them lacks is none."""
    return max(_LEAST_INTERVAL_TOKENS, 2 * max((reach.num_tokens for reach in reaches), default=0))


def interval_tokens(
    reaches: Sequence[Reach], *, window_interval: int | None, state_interval_tokens: int
) -> int:
    """How far apart boundaries are in an engine: by its setting, and where there are states as far
    as it keeps these."""
    if STATE in reaches:
        return state_interval_tokens
    return default_interval_tokens(reaches) if window_interval is None else window_interval


def _num_blocks(num_tokens: int, block_tokens: int) -> int:
    return -(-num_tokens // block_tokens)
