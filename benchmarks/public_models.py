"""Public models as their config.json has them: what their layers keep of a prompt, in bfloat16.

A GDN state is in bfloat16 too: `mamba_ssm_cache_dtype: auto` is the type of the conv state (vLLM,
model_executor/layers/mamba/mamba_utils.py, _mamba_state_dtype), and models/config.py changes that
for Qwen3.5 but not for Qwen3-Next. The blocks of vLLM's are those of Hopper's default kernels (16;
FlashMLA has 64); with states a block grows until its page holds one (platforms/interface.py,
_align_hybrid_block_size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ucm.store.blocks.page_layout import PageGeometry
from ucm.store.blocks.strands import ALL, Reach, ReachKind, default_interval_tokens

ITEM_BYTES: Final = 2
# The default of `block_tokens`; with an engine's larger blocks it must be a multiple of theirs.
BLOCK_TOKENS: Final = 128


@dataclass(frozen=True)
class Layers:
    """Attention layers of one kind. MLA has one head and no V."""

    count: int
    kv_heads: int
    k_size: int
    v_size: int
    reach: Reach = ALL

    def geometry(self, block_tokens: int) -> PageGeometry:
        return PageGeometry(
            num_layers=self.count,
            num_kv_heads=self.kv_heads,
            block_tokens=block_tokens,
            k_size=self.k_size,
            v_size=self.v_size,
            item_bytes=ITEM_BYTES,
        )

    @property
    def is_mla(self) -> bool:
        return self.v_size == 0

    def rank_token_bytes(self, tp_size: int) -> int:
        """Of one layer, on one rank: with more ranks than heads each has a copy of one."""
        heads = max(1, self.kv_heads // tp_size)
        return heads * (self.k_size + self.v_size) * ITEM_BYTES


@dataclass(frozen=True)
class States:
    """Layers with gated delta nets, as Qwen3-Next has them."""

    count: int
    k_heads: int
    v_heads: int
    head_size: int
    conv_kernel: int

    @property
    def layer_bytes(self) -> int:
        conv_channels = (2 * self.k_heads + self.v_heads) * self.head_size
        conv = conv_channels * (self.conv_kernel - 1)
        ssm = self.v_heads * self.head_size * self.head_size
        return (conv + ssm) * ITEM_BYTES


@dataclass(frozen=True)
class Model:
    """`kernel_tokens` is vLLM's block where no states make it larger."""

    name: str
    attention: tuple[Layers, ...]
    states: States | None = None
    kernel_tokens: int = 16

    @property
    def token_bytes(self) -> int:
        return sum(layers.geometry(1).page_bytes for layers in self.attention)

    @property
    def state_bytes(self) -> int:
        """At one token, of all layers."""
        return 0 if self.states is None else self.states.count * self.states.layer_bytes

    def engine_block_tokens(self, tp_size: int) -> int:
        if self.states is None:
            return self.kernel_tokens
        token_bytes = self.attention[0].rank_token_bytes(tp_size)
        state_bytes = self.states.layer_bytes // tp_size
        return self.kernel_tokens * blocks_of(state_bytes, self.kernel_tokens * token_bytes)

    def block_tokens(self, tp_size: int) -> int:
        """UCM's."""
        of_engine = self.engine_block_tokens(tp_size)
        return of_engine * blocks_of(BLOCK_TOKENS, of_engine)

    def interval_tokens(self, tp_size: int) -> int:
        """From one of UCM's boundaries to the next, by default; 0 for the ends of prompts only. Of
        states there are those that vLLM keeps: by default the last one."""
        if self.states is not None:
            return 0
        block_tokens = self.block_tokens(tp_size)
        interval = default_interval_tokens(layers.reach for layers in self.attention)
        return blocks_of(interval, block_tokens) * block_tokens


MODELS: Final = (
    Model(
        "Gemma 3 27B",
        (Layers(10, 16, 128, 128), Layers(52, 16, 128, 128, Reach(ReachKind.WINDOW, 1024))),
    ),
    Model(
        "gpt-oss-120b",
        (Layers(18, 8, 64, 64), Layers(18, 8, 64, 64, Reach(ReachKind.WINDOW, 128))),
    ),
    Model("Qwen3-Next-80B-A3B", (Layers(12, 2, 256, 256),), States(36, 16, 32, 128, 4)),
    # The latent of 512 and the rotary part of 64.
    Model("DeepSeek V3", (Layers(61, 1, 512 + 64, 0),), kernel_tokens=64),
    Model("Llama 3.3 70B", (Layers(80, 8, 128, 128),)),
)


def blocks_of(num: int, unit: int) -> int:
    return -(-num // unit)
