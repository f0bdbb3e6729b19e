"""One request as the scheduler side sees it, and the ranges of blocks that follow from it.

Blocks are UCM's (`block_tokens` of the settings); device blocks are the engine's, which may be
smaller. All ranges are half-open.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ucm.integration.vllm.copies import PagePart
from ucm.integration.vllm.engine_facts import AdapterDigests
from ucm.integration.vllm.promises import Promise
from ucm.store.keys import Item, Key, TailKey, block_keys, root_key, tail_key

# What vLLM's own hashing of an item's content looks like. Anything else is a name that the client
# chose, which says nothing about the content.
_CONTENT_HASH = re.compile(r"[0-9a-f]{32,128}")


@dataclass(eq=False)
class RequestState:
    """Lives from vLLM's first word of a request to its last. `device_blocks` are the engine's;
    `local_tokens` is how much of the prompt vLLM had itself when it last asked. The last of `keys`
    may be that of a tail. `promise` is what somebody else has said of the prompt; whether
    it was kept `is_accounted` when vLLM first allocates."""

    request: Any
    keys: list[Key]
    promise: Promise | None = None
    device_blocks: list[int] = field(default_factory=list)
    local_tokens: int = 0
    no_loads: bool = False
    # Why its last lookup brought no more; empty if it brought all.
    end_reason: str = ""
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

    def tokens_in(self, num_blocks: int, block_tokens: int) -> int:
        """How many tokens of the prompt are in so many leading blocks."""
        return min(num_blocks * block_tokens, self.num_prompt)

    def tail_at(self, end_block: int) -> int:
        """`tail_tokens` if the tail is the last of the blocks before `end_block`, else 0."""
        return self.tail_tokens if end_block == len(self.keys) else 0


def request_keys(
    request: Any,
    *,
    fingerprint: bytes,
    block_tokens: int,
    adapters: AdapterDigests,
    with_tail: bool = False,
) -> list[Key]:
    """Keys of the prompt's full blocks, with `with_tail` also of what is left behind them. None
    where something that shaped the KV can't be named by its content: prompt embeddings, streamed
    prompts, items that the client named."""
    tokens = request.prompt_token_ids
    if tokens is None or request.prompt_embeds is not None or request.resumable:
        return []
    items = []
    for feature in request.mm_features:
        content = feature.mm_hash or feature.identifier
        if not _CONTENT_HASH.fullmatch(content):
            return []
        place = feature.mm_position
        items.append(Item(content, int(place.offset), int(place.length)))
    lora_digest = None
    if request.lora_request is not None:
        lora_digest = adapters.of(request.lora_request)
        if lora_digest is None:
            return []
    root = root_key(fingerprint, lora_digest=lora_digest, cache_salt=request.cache_salt)
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
