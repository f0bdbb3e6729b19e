"""vLLM's scheduler for a model that is nothing but its configuration, and ways to run it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.structured_output import StructuredOutputManager

from tests.integration.vllm.storm_device import UNIT

VOCABULARY = 50
MAX_TOKENS = 16 * UNIT


@dataclass(frozen=True)
class Weather:
    """One way to run an engine, and how bad everything is."""

    prefix_caching: bool = True
    layerwise: bool = False
    block_tokens: int = UNIT
    world_size: int = 1
    role: str = "kv_both"
    recompute: bool = True
    step_tokens: int = 3 * UNIT
    num_blocks: int = 40
    num_slots: int = 40
    keeps_unpinned: bool = True
    failing: float = 0.02

    @classmethod
    def of(cls, rng: random.Random) -> Weather:
        return cls(
            prefix_caching=rng.random() < 0.7,
            layerwise=rng.random() < 0.3,
            block_tokens=rng.choice((UNIT, 2 * UNIT)),
            world_size=rng.choice((1, 1, 2)),
            role=rng.choice(("kv_both", "kv_both", "kv_both", "kv_producer", "kv_consumer")),
            recompute=rng.random() < 0.7,
            step_tokens=rng.choice((UNIT, 3 * UNIT, 20 * UNIT)),
            num_blocks=rng.choice((24, 40, 120)),
            num_slots=rng.choice((6, 40, 200)),
            keeps_unpinned=rng.random() < 0.8,
            failing=rng.choice((0.0, 0.05)),
        )


def make_scheduler(folder: Path, weather: Weather, *, connector_module: str) -> Scheduler:
    if not (folder / "config.json").exists():
        Qwen2Config(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            vocab_size=VOCABULARY,
            max_position_embeddings=4096,
            architectures=["Qwen2ForCausalLM"],
        ).save_pretrained(folder)
    scheduler_config = SchedulerConfig(
        max_num_seqs=16,
        max_num_batched_tokens=weather.step_tokens,
        max_model_len=MAX_TOKENS,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
        disable_hybrid_kv_cache_manager=True,
        async_scheduling=False,
    )
    model_config = ModelConfig(
        model=str(folder),
        tokenizer=str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=MAX_TOKENS,
        seed=0,
    )
    cache_config = CacheConfig(
        block_size=UNIT, enable_prefix_caching=weather.prefix_caching, cache_dtype="auto"
    )
    cache_config.num_gpu_blocks = weather.num_blocks
    config = VllmConfig(
        scheduler_config=scheduler_config,
        model_config=model_config,
        cache_config=cache_config,
        device_config=DeviceConfig("cpu"),
        kv_transfer_config=KVTransferConfig(
            kv_connector="StormConnector",
            kv_connector_module_path=connector_module,
            kv_role=weather.role,
            kv_load_failure_policy="recompute" if weather.recompute else "fail",
        ),
    )
    spec = FullAttentionSpec(block_size=UNIT, num_kv_heads=1, head_size=64, dtype=torch.float32)
    page = spec.page_size_bytes
    kv_cache_config = KVCacheConfig(
        num_blocks=weather.num_blocks,
        kv_cache_tensors=[
            KVCacheTensor(
                size=page * weather.num_blocks,
                layers=["layers.0"],
                layer_stride=page * weather.num_blocks,
                block_stride=page,
            )
        ],
        kv_cache_groups=[KVCacheGroupSpec(["layers.0"], spec)],
    )
    return Scheduler(
        vllm_config=config,
        kv_cache_config=kv_cache_config,
        structured_output_manager=StructuredOutputManager(config),
        block_size=UNIT,
        log_stats=False,
    )
