"""An engine's configuration as far as it is read, and layers as vLLM's own workers group them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from ucm.config.settings import Settings, StoreSettings
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.vllm import strand_layout
from ucm.integration.vllm.engine_facts import engine_facts

HEADS, SIZE, WINDOW, CHUNK, BLOCK = 4, 64, 256, 8192, 16
SHAPE: dict[str, Any] = {
    "block_size": BLOCK,
    "num_kv_heads": HEADS,
    "head_size": SIZE,
    "dtype": torch.bfloat16,
}
FULL = FullAttentionSpec(**SHAPE)
WINDOWED = SlidingWindowSpec(**SHAPE, sliding_window=WINDOW)
CHUNKED = ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=CHUNK)
# Of another shape: fewer heads, and larger ones.
LARGE = FullAttentionSpec(**{**SHAPE, "num_kv_heads": 1, "head_size": 512})


def config(*, tp_size: int = 1, pp_size: int = 1, hybrid: bool = True, **more: Any) -> Any:
    """As much of vLLM's configuration as is read."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            dtype=torch.bfloat16,
            max_model_len=4096,
            quantization=None,
            hf_config=SimpleNamespace(),
            hf_text_config=SimpleNamespace(
                model_type=more.get("model_type", "gemma3_text"),
                num_hidden_layers=24,
                to_dict=lambda: {"hidden_size": 8},
            ),
            multimodal_config=None,
            is_prefix_caching_supported=True,
            enable_sleep_mode=False,
            get_total_num_kv_heads=lambda: more.get("total_heads", HEADS),
            get_head_size=lambda: SIZE,
            model_arch_config=more.get("arch"),
        ),
        cache_config=SimpleNamespace(
            cache_dtype="auto",
            calculate_kv_scales=False,
            enable_prefix_caching=True,
            kv_cache_layout="LBHNC",
            get_resolved_kv_cache_layout=lambda: KVCacheLayout[more.get("layout", "LBHNC")],
            prefix_cache_retention_interval=None,
            num_gpu_blocks_override=None,
        ),
        scheduler_config=SimpleNamespace(
            enable_chunked_prefill=True,
            max_num_batched_tokens=64,
            disable_hybrid_kv_cache_manager=not hybrid,
        ),
        parallel_config=SimpleNamespace(
            nnodes=1,
            world_size=tp_size * pp_size,
            tensor_parallel_size=tp_size,
            pipeline_parallel_size=pp_size,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
        ),
        kv_transfer_config=SimpleNamespace(engine_id="e", is_kv_consumer=True, is_kv_producer=True),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=more.get("speculative"),
        lora_config=None,
        load_config=SimpleNamespace(load_format="auto"),
        instance_id="i",
    )


def name(number: int) -> str:
    return f"model.layers.{number}.self_attn.attn"


def by_vllm(given: Any, specs: Sequence[KVCacheSpec]) -> KVCacheConfig:
    """The layers with these specs, as vLLM's own workers group them and lay them into memory."""
    layers = {name(number): spec for number, spec in enumerate(specs)}
    return get_kv_cache_config_from_groups(given, get_kv_cache_groups(given, layers), 1 << 30)


def grouped(*groups: tuple[KVCacheSpec, Sequence[int]]) -> KVCacheConfig:
    specs = [KVCacheGroupSpec([name(n) for n in numbers], spec) for spec, numbers in groups]
    return KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=specs)


def facts_of(
    cache: KVCacheConfig,
    given: Any = None,
    *,
    block_tokens: int = 128,
    isa: str = "vec",
    **more: Any,
) -> EngineFacts:
    """`isa`: of a CPU's attention kernel, whatever this machine's processor has."""
    settings = Settings(
        store=StoreSettings(socket_path="/nowhere"), block_tokens=block_tokens, **more
    )
    with mock.patch.object(strand_layout, "_cpu_isa", return_value=isa):
        return engine_facts(given or config(), cache, settings)
