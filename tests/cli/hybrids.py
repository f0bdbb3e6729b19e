"""Models with several strands, and what their engines leave of a prompt in a store: made by what
the connector makes them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec

from tests.cli.parts import Store
from tests.integration.vllm.strand_engine import (
    BLOCK,
    CHUNKED,
    FULL,
    WINDOWED,
    config,
    facts_of,
    grouped,
)
from tests.integration.vllm.test_indexers import PLAIN, grouped_by_vllm
from ucm.config.settings import Settings, StoreSettings
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.prompt import NamedItems, Prompt, named_prompt
from ucm.integration.vllm.identity import manifest
from ucm.store.blocks.namespace import Manifest, fingerprint
from ucm.store.blocks.strands import kept_blocks

# A state of Mamba 2: three rows of 384 columns, and 8 heads of 32 x 64.
STATES = MambaSpec(
    block_size=BLOCK,
    shapes=((3, 384), (8, 32, 64)),
    dtypes=(torch.bfloat16, torch.float32),
    mamba_type=MambaAttentionBackendEnum.MAMBA2,
    mamba_cache_mode="align",
)


@dataclass(frozen=True)
class Hybrid:
    """An engine of such a model."""

    facts: EngineFacts
    manifest: Manifest

    def prompt(self, tokens: Sequence[int], *, with_tail: bool = False) -> Prompt:
        request = SimpleNamespace(
            request_id="r",
            num_prompt_tokens=len(tokens),
            prompt_token_ids=list(tokens),
            prompt_embeds=None,
            resumable=False,
            lora_request=None,
            cache_salt=None,
        )
        return named_prompt(
            request,
            fingerprint=fingerprint(self.manifest),
            block_tokens=self.manifest.block_tokens,
            named=NamedItems(),
            with_tail=with_tail,
            strand_names=tuple(strand.name for strand in self.facts.strands),
        )

    def kept(self, prompt: Prompt, interval_tokens: int | None = None) -> list[list[int]]:
        """Of each strand the blocks of a prompt that a prefill writes."""
        return [
            sorted(
                kept_blocks(
                    strand.reach,
                    prompt.num_tokens,
                    len(prompt.keys),
                    prompt.block_tokens,
                    self.facts.interval_tokens(interval_tokens),
                    with_states=self.facts.has_states,
                )
            )
            for strand in self.facts.strands
        ]

    def fill(
        self,
        store: Store,
        tokens: Sequence[int],
        *,
        interval_tokens: int | None = None,
        with_tail: bool = False,
    ) -> list[list[int]]:
        """What `kept` says, which is the answer."""
        prompt = self.prompt(tokens, with_tail=with_tail)
        kept = self.kept(prompt, interval_tokens)
        for number, (strand, blocks) in enumerate(zip(self.facts.strands, kept, strict=True)):
            keys = [prompt.key_of(block, number) for block in blocks]
            store.put(self.manifest, keys, page_bytes=strand.geometry.page_bytes)
        return kept


def hybrid(cache: KVCacheConfig, name: str = "gemma", **more: Any) -> Hybrid:
    """An engine with these groups of layers; `more` is of `config`."""
    block_tokens = more.pop("block_tokens", BLOCK)
    given = config(**more)
    settings = Settings(
        store=StoreSettings(socket_path="/nowhere"), block_tokens=block_tokens, model_id=name
    )
    facts = facts_of(cache, given, block_tokens=block_tokens)
    return Hybrid(facts, manifest(given, facts, settings, epoch=0))


def with_windows() -> Hybrid:
    """Three layers with a window of 256, and one that attends to everything."""
    return hybrid(grouped((WINDOWED, [0, 1, 2]), (FULL, [3])))


def with_states() -> Hybrid:
    return hybrid(grouped((STATES, [0, 1, 2]), (FULL, [3])), "granite")


def with_chunks_as_large() -> Hybrid:
    """Pages of both strands have one size."""
    return hybrid(grouped((CHUNKED, [0, 1]), (FULL, [2, 3])), "llama")


def with_an_indexer() -> Hybrid:
    return hybrid(grouped_by_vllm([PLAIN] * 3), "deepseek", block_tokens=64)


def with_windows_alone() -> Hybrid:
    return hybrid(grouped((WINDOWED, [0, 1, 2, 3])), "mistral")
