"""What a model with several strands or with windows is, in one line for its log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ucm.integration.engine.facts import StrandFacts
from ucm.store.blocks.strands import ALL, kept_blocks

# Long enough for many boundaries, and what people call a long prompt.
_PROMPT_TOKENS: Final = 32 << 10
_UNITS: Final = ("bytes", "KiB", "MiB", "GiB")


def strands_text(strands: Sequence[StrandFacts], interval_tokens: int) -> str:
    """The strands, the bytes of each, and what a prefill writes. Boundaries lie `interval_tokens`
    apart, 0: at the ends of prompts only."""
    with_states = any(strand.has_states for strand in strands)
    written = sum(_written_bytes(strand, interval_tokens, with_states) for strand in strands)
    return (
        f"this model has {_count(strands)}: {'; '.join(map(_strand_text, strands))}. "
        f"{_boundaries(strands, interval_tokens)} a prompt of {_PROMPT_TOKENS} writes "
        f"{_size(written * 1000 / _PROMPT_TOKENS)} per 1000 tokens{_share(strands, written)}"
    )


def _boundaries(strands: Sequence[StrandFacts], interval_tokens: int) -> str:
    """Where hits end, and which setting or flag of vLLM's would change that."""
    if all(strand.reach == ALL for strand in strands):
        return f"Of every block of {strands[0].geometry.block_tokens} tokens all is kept, so"
    ends, setting = "the end of a prompt", "window_interval"
    block_tokens = strands[0].geometry.block_tokens
    if any(strand.has_states for strand in strands):
        ends = f"the last multiple of {block_tokens} tokens (--block-size) in a prompt"
        setting = "--prefix-cache-retention-interval"
    if interval_tokens:
        step = -(-interval_tokens // block_tokens) * block_tokens
        return f"Hits end every {step} tokens ({setting}) and at {ends}:"
    return f"Hits end at {ends} (more often with {setting}):"


def _share(strands: Sequence[StrandFacts], written_bytes: int) -> str:
    """States are none of the tokens' own."""
    if any(strand.has_states for strand in strands):
        return ""
    dense_bytes = sum(map(_token_bytes, strands)) * _PROMPT_TOKENS
    return f", {round(100 * written_bytes / dense_bytes)} % of its KV"


def _count(strands: Sequence[StrandFacts]) -> str:
    return "1 strand" if len(strands) == 1 else f"{len(strands)} strands"


def _strand_text(strand: StrandFacts) -> str:
    if strand.has_states:
        size = _size(strand.geometry.page_bytes)
        return f"{strand.reach}, {_layers(len(strand.layer_names))}, {size} per boundary"
    return (
        f"{strand.reach}, {_layers(strand.geometry.num_layers)}, {_size(_token_bytes(strand))} per "
        f"token, {_size(strand.geometry.page_bytes)} per block"
    )


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


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
