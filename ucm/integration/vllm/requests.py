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
from ucm.store.keys import Item, Key, block_keys, root_key

# What vLLM's own hashing of an item's content looks like. Anything else is a name that the client
# chose, which says nothing about the content.
_CONTENT_HASH = re.compile(r"[0-9a-f]{32,128}")


@dataclass(eq=False)
class RequestState:
    """Lives from vLLM's first word of a request to its last. `device_blocks` are the engine's;
    `local_tokens` is how much of the prompt vLLM had itself when it last asked."""

    request: Any
    keys: list[Key]
    device_blocks: list[int] = field(default_factory=list)
    local_tokens: int = 0
    no_loads: bool = False

    @property
    def request_id(self) -> str:
        return str(self.request.request_id)


def request_keys(
    request: Any, *, fingerprint: bytes, block_tokens: int, adapters: AdapterDigests
) -> list[Key]:
    """Keys of the prompt's full blocks. None where something that shaped the KV can't be named by
    its content: prompt embeddings, streamed prompts, items that the client named."""
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
    return block_keys(root, tokens, block_tokens=block_tokens, items=items)


def parents(keys: Sequence[Key], blocks: Sequence[int]) -> list[bytes]:
    """The key before each block, empty for the first of the prompt."""
    return [keys[block - 1] if block else b"" for block in blocks]


def part_of_block(
    block: int, slot_offset: int, device_blocks: Sequence[int], *, block_tokens: int, unit: int
) -> PagePart:
    """A whole block of `block_tokens`, kept in device blocks of `unit` tokens each."""
    per_block = block_tokens // unit
    first = block * per_block
    return PagePart(
        slot_offset=slot_offset,
        first_token=0,
        block_ids=tuple(device_blocks[first : first + per_block]),
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
