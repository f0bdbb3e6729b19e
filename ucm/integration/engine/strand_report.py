"""What a model with several strands or with windows is, in one line for its log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ucm.integration.engine.facts import StrandFacts
from ucm.store.blocks.strands import ALL, default_interval_tokens, kept_blocks

# Long enough for many boundaries, and what people call a long prompt.
_PROMPT_TOKENS: Final = 32 << 10
_UNITS: Final = ("bytes", "KiB", "MiB", "GiB")


def strands_text(strands: Sequence[StrandFacts], interval_tokens: int | None = None) -> str:
    """The strands, the bytes of each, and what a prefill writes. Boundaries lie `interval_tokens`
    apart (None: as by default, 0: at the ends of prompts only). Where there are states, by default
    vLLM keeps the last one."""
    with_states = any(strand.has_states for strand in strands)
    default = 0 if with_states else default_interval_tokens(strand.reach for strand in strands)
    interval = default if interval_tokens is None else interval_tokens
    written = sum(_written_bytes(strand, interval, with_states) for strand in strands)
    dense = sum(_token_bytes(each) for each in strands if not each.has_states) * _PROMPT_TOKENS
    share = round(100 * written / dense)
    return (
        f"this model has {_count(strands)}: {'; '.join(map(_strand_text, strands))}. "
        f"{_boundaries(strands, interval)} a prompt of {_PROMPT_TOKENS} writes "
        f"{_size(written * 1000 / _PROMPT_TOKENS)} per 1000 tokens, {share} % of its KV"
        f"{_states_hint(strands)}"
    )


def _boundaries(strands: Sequence[StrandFacts], interval_tokens: int) -> str:
    if all(strand.reach == ALL for strand in strands):
        return f"Of every block of {strands[0].geometry.block_tokens} tokens all is kept, so"
    return f"With a boundary every {interval_tokens or _PROMPT_TOKENS} tokens"


def _states_hint(strands: Sequence[StrandFacts]) -> str:
    """What of vLLM's flags would change hits."""
    sizes = [strand.geometry.block_tokens for strand in strands if strand.has_states]
    if not sizes:
        return ""
    return (
        f"; hits end at multiples of {sizes[0]} tokens (--block-size) that vLLM keeps states at: "
        "at more of them with --prefix-cache-retention-interval"
    )


def _count(strands: Sequence[StrandFacts]) -> str:
    return "1 strand" if len(strands) == 1 else f"{len(strands)} strands"


def _strand_text(strand: StrandFacts) -> str:
    if strand.has_states:
        size = _size(strand.geometry.page_bytes)
        return f"{strand.reach}, {len(strand.layer_names)} layers, {size} per boundary"
    return (
        f"{strand.reach}, {strand.geometry.num_layers} layers, {_size(_token_bytes(strand))} per "
        f"token, {_size(strand.geometry.page_bytes)} per block"
    )


def _token_bytes(strand: StrandFacts) -> float:
    return strand.geometry.page_bytes / strand.geometry.block_tokens


def _written_bytes(strand: StrandFacts, interval_tokens: int, with_states: bool) -> int:
    block_tokens = strand.geometry.block_tokens
    num_blocks = _PROMPT_TOKENS // block_tokens
    kept = kept_blocks(
        strand.reach,
        _PROMPT_TOKENS,
        num_blocks,
        block_tokens,
        interval_tokens,
        with_states=with_states,
    )
    return len(kept) * strand.geometry.page_bytes


def _size(num_bytes: float) -> str:
    unit = 0
    while num_bytes >= 1024 and unit < len(_UNITS) - 1:
        num_bytes, unit = num_bytes / 1024, unit + 1
    return f"{num_bytes:.4g} {_UNITS[unit]}"
