"""One request as the scheduler side sees it, and the ranges of blocks that follow from it.

Blocks are UCM's (`block_tokens` of the settings); device blocks are the engine's, which may be
smaller. All ranges are half-open.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ucm.handoff import Handoff
from ucm.integration.copies.jobs import PagePart
from ucm.integration.engine.promise import Promise
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Item, Key, TailKey, block_keys, root_key, tail_key

if TYPE_CHECKING:
    from ucm.integration.engine.naming import RequestNaming


@dataclass(frozen=True)
class NamedItems:
    """Of what a prompt has beside tokens, the items before `end`, where the first stands that has
    no name (None: all have one)."""

    items: tuple[Item, ...] = ()
    end: int | None = None


@dataclass(eq=False)
class RequestState:
    """Lives from vLLM's first word of a request to its last. `device_blocks` are the engine's;
    `local_tokens` is how much of the prompt vLLM had itself when it last asked. The last of `keys`
    may be that of a tail; there are none while `naming` goes on, and `lora_digest` is in them.
    `promise` is what somebody else has said of the prompt; whether it was kept `is_accounted` when
    vLLM first allocates."""

    request: Any
    keys: list[Key] = field(default_factory=list)
    handoff: Handoff | None = None
    naming: RequestNaming | None = None
    lora_digest: bytes | None = None
    promise: Promise | None = None
    device_blocks: list[int] = field(default_factory=list)
    local_tokens: int = 0
    no_loads: bool = False
    # Until when it waits for its turn to ask the store.
    turn_by_s: float | None = None
    # Why its last lookup brought no more; empty if it brought all.
    end_reason: Outcome = Outcome.FINE
    is_accounted: bool = False
    # Leading blocks that are in the store at its end, or on their way there.
    kept_blocks: int = 0
    wants_receipt: bool = False

    @property
    def request_id(self) -> str:
        return str(self.request.request_id)

    @property
    def num_prompt(self) -> int:
        return int(self.request.num_prompt_tokens)

    @property
    def tail_tokens(self) -> int:
        """Of the last key; 0 if that is one of a whole block."""
        return self.keys[-1].num_tokens if self.keys and isinstance(self.keys[-1], TailKey) else 0

    def blocks_in(self, num_tokens: int, block_tokens: int) -> int:
        """How many leading blocks are complete when so many tokens are. A tail is with the last."""
        if self.tail_tokens and num_tokens >= self.num_prompt:
            return len(self.keys)
        return num_tokens // block_tokens

    def tail_at(self, end_block: int) -> int:
        """`tail_tokens` if the tail is the last of the blocks before `end_block`, else 0."""
        return self.tail_tokens if end_block == len(self.keys) else 0


def request_keys(
    request: Any,
    *,
    fingerprint: bytes,
    block_tokens: int,
    named: NamedItems,
    lora_digest: bytes | None = None,
    with_tail: bool = False,
) -> list[Key]:
    """Keys of the prompt's full blocks, with `with_tail` also of what is left behind them; those
    wholly before the first item that has no name. None where nothing can be named: streamed
    prompts, and those whose adapter has no digest."""
    if request.resumable or (request.lora_request is not None and lora_digest is None):
        return []
    tokens = request.prompt_token_ids
    if tokens is None:
        if request.prompt_embeds is None:
            return []
        tokens = [0] * request.num_prompt_tokens
    if named.end is not None:
        tokens = tokens[: named.end // block_tokens * block_tokens]
    root = root_key(fingerprint, lora_digest=lora_digest, cache_salt=request.cache_salt)
    items = [item for item in named.items if item.start < len(tokens)]
    keys = block_keys(root, tokens, block_tokens=block_tokens, items=items)
    start = len(keys) * block_tokens
    # A hit must leave something computed in front of the last token, which vLLM computes again.
    if with_tail and start < len(tokens) and len(tokens) > 1:
        parent = keys[-1] if keys else root
        keys.append(
            tail_key(
                parent, tokens[start:], block_tokens=block_tokens, first_token=start, items=items
            )
        )
    return keys


def parents(keys: Sequence[Key], blocks: Sequence[int]) -> list[bytes]:
    """The key before each block, empty for the first of the prompt."""
    return [keys[block - 1] if block else b"" for block in blocks]


def part_of_block(
    block: int,
    slot_offset: int,
    device_blocks: Sequence[int],
    *,
    num_tokens: int,
    block_tokens: int,
    unit: int,
) -> PagePart:
    """The first `num_tokens` of a block of `block_tokens`, kept in device blocks of `unit` tokens
    each. The last of these may reach further."""
    first = block * block_tokens // unit
    return PagePart(
        slot_offset=slot_offset,
        first_token=0,
        block_ids=tuple(device_blocks[first : first - (-num_tokens // unit)]),
    )


def parts_of_tokens(
    start: int,
    end: int,
    slot_offsets: dict[int, int],
    device_blocks: Sequence[int],
    *,
    block_tokens: int,
    unit: int,
) -> tuple[PagePart, ...]:
    """The device blocks that hold tokens [start, end), block by block of the store.

    `start` is at the border of a device block; the last device block may reach past `end`, where
    the page has the tokens that follow.
    """
    assert start % unit == 0, "vLLM hands out whole device blocks"
    parts = []
    at = start
    while at < end:
        block = at // block_tokens
        stop = min((block + 1) * block_tokens, -(-end // unit) * unit)
        parts.append(
            PagePart(
                slot_offset=slot_offsets[block],
                first_token=at - block * block_tokens,
                block_ids=tuple(device_blocks[at // unit : stop // unit]),
            )
        )
        at = stop
    return tuple(parts)
