"""A prompt once it is named: its keys, and how many of its blocks are in so many tokens.

Blocks are UCM's (`block_tokens` of the settings); device blocks are the engine's, which may be
smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ucm.store.blocks.hit_ends import ends_in_base
from ucm.store.blocks.keys import (
    Item,
    Key,
    TailKey,
    block_keys,
    prompt_keys,
    root_key,
    strand_key,
)
from ucm.store.blocks.strands import boundaries


@dataclass(frozen=True)
class NamedItems:
    """Of what a prompt has beside tokens, the items before `end`, where the first stands that has
    no name (None: all have one)."""

    items: tuple[Item, ...] = ()
    end: int | None = None


@dataclass(frozen=True)
class Chain:
    """What names the blocks behind a prompt whose every token has a name: `root` is the parent of
    its first key, and the prompt's `items` reach into the block that it ends in."""

    root: Key
    items: tuple[Item, ...] = ()
    cache_salt: str | None = None


@dataclass(frozen=True)
class Prompt:
    """What is known of a request's prompt. Without `keys` nothing of it has a name, or not yet. The
    last key may be that of a tail: the block at the prompt's end that its tokens only partly fill.
    `lora_request` is the engine's, and `lora_digest`, which is in the keys, names its adapter.
    Without a `chain` what is answered has no names."""

    request_id: str
    num_tokens: int
    block_tokens: int
    keys: tuple[Key, ...] = ()
    lora_request: Any = None
    lora_digest: bytes | None = None
    is_salted: bool = False
    # Of the strands beside the base, whose keys follow from those of the base.
    strand_names: tuple[str, ...] = ("",)
    chain: Chain | None = None

    @property
    def full_blocks(self) -> int:
        """How many of its keys are those of whole blocks."""
        return len(self.keys) - bool(self.tail_tokens)

    def key_of(self, block: int, strand: int = 0) -> Key:
        """Of a block in one of the strands."""
        key, name = self.keys[block], self.strand_names[strand]
        return strand_key(key, name, is_salted=self.is_salted) if strand else key

    @property
    def tail_tokens(self) -> int:
        """Of the last key; 0 if that is one of a whole block."""
        return self.keys[-1].num_tokens if self.keys and isinstance(self.keys[-1], TailKey) else 0

    def blocks_in(self, num_tokens: int) -> int:
        """How many leading blocks are complete when so many tokens are. A tail is with the last."""
        if num_tokens >= self.num_tokens:
            return len(self.keys)
        return min(num_tokens // self.block_tokens, len(self.keys))

    def tail_at(self, end_block: int) -> int:
        """`tail_tokens` if the tail is the last of the blocks before `end_block`, else 0."""
        return self.tail_tokens if end_block == len(self.keys) else 0

    def tokens_of(self, block: int) -> int:
        """How many tokens are in a block."""
        return self.tail_at(block + 1) or self.block_tokens

    def tokens_before(self, end_block: int) -> int:
        """How many tokens the blocks before `end_block` have."""
        return min(end_block * self.block_tokens, self.num_tokens)

    def boundaries(self, interval_tokens: int, *, with_states: bool = False) -> list[int]:
        """Where every prefill of this prompt keeps what is needed to go on. The last one first."""
        return boundaries(
            self.num_tokens,
            len(self.keys),
            self.block_tokens,
            interval_tokens,
            with_states=with_states,
        )

    def ends_in_base(
        self, num_blocks: int, interval_tokens: int, *, with_states: bool
    ) -> list[int]:
        """Where a hit may end whose base has so many blocks, the first to be tried first."""
        return ends_in_base(
            self.num_tokens,
            num_blocks,
            self.block_tokens,
            self.boundaries(interval_tokens, with_states=with_states),
            with_states=with_states,
        )

    def parents(self, blocks: Sequence[int]) -> list[bytes]:
        """The key before each block, empty for the first of the prompt."""
        return [self.keys[block - 1] if block else b"" for block in blocks]

    def without_keys(self) -> Prompt:
        """It goes without the store."""
        return replace(self, keys=(), chain=None)

    def grown(self, tokens: Sequence[int]) -> Prompt:
        """The prompt and what was answered to it: `tokens` are those behind its whole blocks. What
        was its tail is none any more. For one with a chain."""
        assert self.chain is not None
        chain, keys = self.chain, self.keys[: self.full_blocks]
        first_token = len(keys) * self.block_tokens
        more = block_keys(
            keys[-1] if keys else chain.root,
            tokens,
            block_tokens=self.block_tokens,
            items=chain.items,
            first_token=first_token,
            cache_salt=chain.cache_salt,
        )
        return replace(self, num_tokens=first_token + len(tokens), keys=(*keys, *more))


def unnamed_prompt(request: Any, *, block_tokens: int) -> Prompt:
    return Prompt(str(request.request_id), int(request.num_prompt_tokens), block_tokens)


def named_prompt(
    request: Any,
    *,
    fingerprint: bytes,
    block_tokens: int,
    named: NamedItems,
    lora_digest: bytes | None = None,
    with_tail: bool = False,
    strand_names: tuple[str, ...] = ("",),
) -> Prompt:
    """With keys of the prompt's full blocks, with `with_tail` also of what is left behind them;
    those wholly before the first item that has no name. None where nothing can be named: streamed
    prompts, and those whose adapter has no digest."""
    prompt = unnamed_prompt(request, block_tokens=block_tokens)
    if request.resumable or (request.lora_request is not None and lora_digest is None):
        return prompt
    tokens = request.prompt_token_ids
    if tokens is None:
        if request.prompt_embeds is None:
            return prompt
        tokens = [0] * prompt.num_tokens
    if named.end is not None:
        tokens = tokens[: named.end // block_tokens * block_tokens]
    salt = request.cache_salt
    root = root_key(fingerprint, lora_digest=lora_digest, cache_salt=salt)
    items = [item for item in named.items if item.start < len(tokens)]
    is_all_named = named.end is None and request.prompt_embeds is None
    keys = prompt_keys(
        root,
        tokens,
        block_tokens=block_tokens,
        items=items,
        cache_salt=salt,
        with_tail=with_tail,
    )
    return replace(
        prompt,
        keys=tuple(keys),
        lora_request=request.lora_request,
        lora_digest=lora_digest,
        is_salted=salt is not None,
        strand_names=strand_names,
        chain=Chain(root, tuple(items), salt) if is_all_named else None,
    )
