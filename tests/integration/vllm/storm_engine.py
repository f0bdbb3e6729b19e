"""vLLM's scheduler for a model that is nothing but its configuration, and ways to run it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.structured_output import StructuredOutputManager

from tests.integration.vllm.storm_device import UNIT
from ucm.store.blocks.strands import ALL, STATE, Reach, ReachKind

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
    # Of the first group, and of each beside it.
    base: Reach = ALL
    sides: tuple[Reach, ...] = ()
    schedules_ahead: bool = False
    # How far apart vLLM keeps states: None for every block. Whether it can keep one in the middle
    # of what a step computes.
    state_interval: int | None = 0
    checkpoints: bool = False
    # How many tokens are guessed behind each that is answered.
    num_guesses: int = 0

    @property
    def reaches(self) -> tuple[Reach, ...]:
        return (self.base, *self.sides)

    @property
    def is_plain(self) -> bool:
        return self.reaches == (ALL,)

    @property
    def has_states(self) -> bool:
        return STATE in self.sides

    @property
    def state_interval_tokens(self) -> int:
        return UNIT if self.state_interval is None else self.state_interval

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

    @classmethod
    def with_windows(cls, rng: random.Random) -> Weather:
        return replace(
            cls.of(rng),
            layerwise=False,
            num_blocks=rng.choice((60, 80, 200)),
            sides=rng.choice(
                (
                    (Reach(ReachKind.WINDOW, UNIT + 1),),
                    (Reach(ReachKind.WINDOW, 3 * UNIT),),
                    (Reach(ReachKind.WINDOW, 20), Reach(ReachKind.WINDOW, 70)),
                    (Reach(ReachKind.CHUNK, 4 * UNIT),),
                )
            ),
            schedules_ahead=rng.random() < 0.5,
        )

    @classmethod
    def with_windows_only(cls, rng: random.Random) -> Weather:
        """No group has every block; the first has the longest window."""
        size, *others = rng.choice(((UNIT + 1,), (3 * UNIT,), (70, 20), (5 * UNIT, 2)))
        return replace(
            cls.with_windows(rng),
            base=Reach(ReachKind.WINDOW, size),
            sides=tuple(Reach(ReachKind.WINDOW, other) for other in others),
        )

    @classmethod
    def with_states(cls, rng: random.Random) -> Weather:
        return replace(
            cls.with_windows(rng),
            prefix_caching=True,
            block_tokens=UNIT,
            sides=rng.choice(
                ((STATE,), (STATE, STATE), (STATE, Reach(ReachKind.WINDOW, 3 * UNIT)))
            ),
            state_interval=rng.choice((0, 0, 3 * UNIT, None)),
            checkpoints=rng.random() < 0.5,
        )

    @classmethod
    def with_guesses(cls, rng: random.Random) -> Weather:
        kind = rng.choice((cls.of, cls.with_windows, cls.with_windows_only))
        return replace(kind(rng), schedules_ahead=False, num_guesses=rng.choice((1, 3, 7)))


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
        disable_hybrid_kv_cache_manager=weather.is_plain,
        async_scheduling=weather.schedules_ahead,
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
    if weather.has_states:
        cache_config.mamba_cache_mode = "align"
        cache_config.mamba_block_size = UNIT
        cache_config.prefix_cache_retention_interval = weather.state_interval
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
        speculative_config=_guesses(model_config, weather),
    )
    kind = AsyncScheduler if weather.schedules_ahead else Scheduler
    return kind(
        vllm_config=config,
        kv_cache_config=_kv_cache_config(weather),
        structured_output_manager=StructuredOutputManager(config),
        block_size=UNIT,
        log_stats=False,
    )


def _guesses(model_config: ModelConfig, weather: Weather) -> SpeculativeConfig | None:
    if not weather.num_guesses:
        return None
    return SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=weather.num_guesses,
        prompt_lookup_max=2,
        prompt_lookup_min=1,
        target_model_config=model_config,
        target_parallel_config=ParallelConfig(),
    )


def _kv_cache_config(weather: Weather) -> KVCacheConfig:
    shape: dict[str, Any] = {
        "block_size": UNIT,
        "num_kv_heads": 1,
        "head_size": 64,
        "dtype": torch.float32,
    }
    page = FullAttentionSpec(**shape).page_size_bytes
    specs: list[KVCacheSpec] = []
    for reach in weather.reaches:
        if reach == STATE:
            specs.append(_state_spec(weather, page))
        elif reach == ALL:
            specs.append(FullAttentionSpec(**shape))
        elif reach.kind is ReachKind.WINDOW:
            specs.append(SlidingWindowSpec(**shape, sliding_window=reach.num_tokens))
        else:
            specs.append(ChunkedLocalAttentionSpec(**shape, attention_chunk_size=reach.num_tokens))
    return KVCacheConfig(
        num_blocks=weather.num_blocks,
        kv_cache_tensors=[
            KVCacheTensor(
                size=page * weather.num_blocks,
                layers=[f"layers.{number}"],
                layer_stride=page * weather.num_blocks,
                block_stride=page,
            )
            for number in range(len(specs))
        ],
        kv_cache_groups=[
            KVCacheGroupSpec([f"layers.{number}"], spec) for number, spec in enumerate(specs)
        ],
    )


def _state_spec(weather: Weather, page_bytes: int) -> MambaSpec:
    return MambaSpec(
        block_size=UNIT,
        shapes=((3, 8), (1, 4, 4)),
        dtypes=(torch.float32, torch.float32),
        page_size_padded=page_bytes,
        mamba_cache_mode="align",
        num_prefill_checkpoint_blocks=int(weather.checkpoints),
        prefill_checkpoint_alignment=1 if weather.checkpoints else None,
    )
