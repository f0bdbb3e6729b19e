"""The table of public models against vLLM's own functions, and against what an engine would say."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

import torch
from transformers import DeepseekV3Config, GptOssConfig, Qwen3NextConfig
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from benchmarks.model_bytes import (
    fs_read_bytes,
    fs_row_bytes,
    fs_written_bytes,
    ucm_read_bytes,
    ucm_written_bytes,
)
from benchmarks.public_models import MODELS, Layers, Model, States
from tests.benchmarks.fs_tier import FsTier
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.engine.facts import StrandFacts
from ucm.integration.engine.strand_report import strands_text
from ucm.store.blocks.page_layout import PageGeometry
from ucm.store.blocks.strands import ALL, STATE

GEMMA, GPT_OSS, QWEN, DEEPSEEK, LLAMA = MODELS
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


def spec_of(layers: Layers, block_tokens: int) -> KVCacheSpec:
    common = {"block_size": block_tokens, "num_kv_heads": layers.kv_heads, "dtype": torch.bfloat16}
    if layers.is_mla:
        return MLAAttentionSpec(head_size=layers.k_size, **common)
    if layers.reach == ALL:
        return FullAttentionSpec(head_size=layers.k_size, **common)
    window = layers.reach.num_tokens
    return SlidingWindowSpec(head_size=layers.k_size, sliding_window=window, **common)


def state_spec(states: States, block_tokens: int, padded_bytes: int | None = None) -> MambaSpec:
    shapes = MambaStateShapeCalculator.gated_delta_net_state_shape(
        1, states.k_heads, states.v_heads, states.head_size, states.head_size, states.conv_kernel
    )
    dtypes = MambaStateDtypeCalculator.gated_delta_net_state_dtype(torch.bfloat16, "auto", "auto")
    return MambaSpec(
        shapes=shapes,
        dtypes=dtypes,
        block_size=block_tokens,
        page_size_padded=padded_bytes,
        mamba_cache_mode="align",
    )


def specs_of(model: Model) -> dict[str, KVCacheSpec]:
    block_tokens = model.engine_block_tokens(1)
    specs = []
    for layers in model.attention:
        specs += layers.count * [spec_of(layers, block_tokens)]
    if model.states is not None:
        state = state_spec(model.states, block_tokens, specs[0].page_size_bytes)
        specs += model.states.count * [state]
    return {f"layers.{number}": spec for number, spec in enumerate(specs)}


def test_a_state_is_as_large_as_in_vllm_and_the_block_holds_it() -> None:
    assert QWEN.states is not None
    assert state_spec(QWEN.states, 544).page_size_bytes == QWEN.states.layer_bytes
    page_bytes = spec_of(QWEN.attention[0], QWEN.engine_block_tokens(1)).page_size_bytes
    smaller = spec_of(QWEN.attention[0], QWEN.engine_block_tokens(1) - 16).page_size_bytes
    assert smaller < QWEN.states.layer_bytes <= page_bytes


def test_configurations_are_those_that_transformers_has_of_the_same_models() -> None:
    qwen, gpt_oss, deepseek = Qwen3NextConfig(), GptOssConfig(), DeepseekV3Config()
    kinds = [qwen.layer_types.count(kind) for kind in ("full_attention", "linear_attention")]
    assert QWEN.states is not None
    assert kinds == [QWEN.attention[0].count, QWEN.states.count]
    assert QWEN.attention[0].kv_heads == qwen.num_key_value_heads
    assert QWEN.attention[0].k_size == qwen.head_dim
    assert (QWEN.states.k_heads, QWEN.states.v_heads, QWEN.states.conv_kernel) == (
        qwen.linear_num_key_heads,
        qwen.linear_num_value_heads,
        qwen.linear_conv_kernel_dim,
    )
    assert qwen.linear_key_head_dim == qwen.linear_value_head_dim == QWEN.states.head_size
    whole, window = GPT_OSS.attention
    assert gpt_oss.layer_types.count("full_attention") == whole.count
    assert gpt_oss.layer_types.count("sliding_attention") == window.count
    assert gpt_oss.sliding_window == window.reach.num_tokens
    assert (gpt_oss.num_key_value_heads, gpt_oss.head_dim) == (whole.kv_heads, whole.k_size)
    assert deepseek.num_hidden_layers == DEEPSEEK.attention[0].count
    latent = deepseek.kv_lora_rank + deepseek.qk_rope_head_dim
    assert latent == DEEPSEEK.attention[0].k_size


@each_model
@pytest.mark.parametrize("num_prompt", [4096, 10_001])
@pytest.mark.parametrize("num_steps", [0, 1])
def test_the_fs_tier_writes_and_reads_what_vllms_own_scheduler_says(
    model: Model, num_prompt: int, num_steps: int
) -> None:
    block_tokens = model.engine_block_tokens(1)
    interval = num_steps * -(-2048 // block_tokens) * block_tokens
    tier = FsTier(specs_of(model), interval)
    assert tier.row_bytes == fs_row_bytes(model, 1)
    written_bytes = tier.written_rows(num_prompt) * tier.row_bytes
    assert written_bytes == fs_written_bytes(model, num_prompt, interval, 1)
    if interval == 0:
        assert tier.read_rows(num_prompt) * tier.row_bytes == fs_read_bytes(model, num_prompt, 1)


def test_with_more_ranks_than_heads_the_fs_tier_has_a_copy_for_each_and_ucm_one() -> None:
    assert fs_row_bytes(LLAMA, 8) == fs_row_bytes(LLAMA, 1)
    assert fs_row_bytes(LLAMA, 16) == 2 * fs_row_bytes(LLAMA, 1)
    assert fs_row_bytes(DEEPSEEK, 8) == fs_row_bytes(DEEPSEEK, 1)
    assert ucm_written_bytes(LLAMA, 4096, 0, 16) == 4096 * LLAMA.token_bytes


@pytest.mark.parametrize("model", [GEMMA, GPT_OSS, QWEN], ids=lambda model: model.name)
def test_what_ucm_writes_is_what_an_engine_would_say_at_its_start(model: Model) -> None:
    block_tokens = model.block_tokens(1)
    strands = [
        StrandFacts("", each.reach, each.geometry(block_tokens), LayoutKind.AS_SHAPED, "", ())
        for each in model.attention
    ]
    if model.states is not None:
        page = PageGeometry(
            num_layers=1,
            num_kv_heads=1,
            block_tokens=block_tokens,
            k_size=model.state_bytes,
            v_size=0,
            item_bytes=1,
            unit_tokens=block_tokens,
        )
        strands.append(StrandFacts("", STATE, page, LayoutKind.AS_SHAPED, "", ()))
    for interval in (model.interval_tokens(1), 0):
        written = ucm_written_bytes(model, 32768, interval, 1) * 1000 / 32768
        said = f"a prompt of 32768 writes {written / (1 << 20):.4g} MiB per 1000 tokens"
        line = strands_text(strands, interval)
        assert said in line
        hint = f"at the last multiple of {block_tokens} tokens (--block-size) in a prompt"
        assert (hint in line) == (model.states is not None)
        assert ("of its KV" in line) == (model.states is None)
        assert ("--prefix-cache-retention-interval" in line) == (model.states is not None)
        assert ("window_interval" in line) == (model.states is None)


def test_of_plain_models_all_is_written_and_read() -> None:
    for model in (DEEPSEEK, LLAMA):
        whole = 4096 * model.token_bytes
        assert ucm_written_bytes(model, 4096, 2048, 1) == ucm_read_bytes(model, 4096, 1) == whole
        assert fs_written_bytes(model, 4096, 0, 1) == fs_read_bytes(model, 4096, 1) == whole


def test_a_hit_ends_before_the_last_token_where_a_window_or_a_state_says_so() -> None:
    assert QWEN.states is not None
    state_bytes = QWEN.states.count * QWEN.states.layer_bytes
    for num_prompt, num_blocks in ((544 * 3, 2), (544 * 3 + 1, 3)):
        read = num_blocks * 544 * QWEN.token_bytes + state_bytes
        assert ucm_read_bytes(QWEN, num_prompt, 1) == read
    block_bytes = [layers.geometry(128).page_bytes for layers in GPT_OSS.attention]
    assert ucm_read_bytes(GPT_OSS, 1024, 1) == 8 * block_bytes[0] + block_bytes[1]


def test_a_prompt_of_less_than_a_block_takes_nothing() -> None:
    for model in MODELS:
        assert ucm_written_bytes(model, 15, 2048, 1) == ucm_read_bytes(model, 15, 1) == 0
        assert fs_written_bytes(model, 15, 2048, 1) == fs_read_bytes(model, 15, 1) == 0
