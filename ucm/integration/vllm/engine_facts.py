"""Everything that UCM needs to know about the engine, read from vLLM's configuration in one place.

Only this file, what it asks, and `identity` read vLLM's configuration objects. An engine that can't
be served correctly is refused here, with one sentence; what passes is described by `EngineFacts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ucm.config.settings import Settings
from ucm.errors import UnsupportedEngine
from ucm.integration.ascend.engine import refuse_what_is_unlike
from ucm.integration.engine.facts import EngineFacts, StrandFacts
from ucm.integration.vllm.device_facts import can_sleep, refuse_layerwise_with_micro_batches
from ucm.integration.vllm.encoder import encoder_rules
from ucm.integration.vllm.engine_versions import refuse_what_fails_untold
from ucm.integration.vllm.identity import dtype_name
from ucm.integration.vllm.kv_specs import CachedLayer, cached_layers
from ucm.integration.vllm.strand_facts import read_strands
from ucm.store.blocks.canonical_json import canonical_json
from ucm.store.blocks.strands import ALL, STATE


def engine_facts(vllm_config: Any, kv_cache_config: Any, settings: Settings) -> EngineFacts:
    """Raises UnsupportedEngine with the one sentence that the user gets to see."""
    parallel = vllm_config.parallel_config
    transfer = vllm_config.kv_transfer_config
    layers = cached_layers(kv_cache_config)
    _refuse_spread_engines(parallel)
    refuse_layerwise_with_micro_batches(parallel, settings)
    kinds = {(layer.group, layer.reach) for layer in layers}
    # Before they are looked at: of others, old versions don't say all that is to be known.
    refuse_what_fails_untold(one_plain_group=len(kinds) == 1 and layers[0].reach == ALL)
    strands, targets = read_strands(vllm_config, layers, settings)
    _refuse_states_inside_blocks(vllm_config, strands)
    _refuse_what_is_unlike(vllm_config, settings, layers)
    plain = len(targets) == 1 and strands[0].reach == ALL
    refuse_what_fails_untold(one_plain_group=plain)
    base, no_hits = strands[0], why_no_hits(vllm_config)
    return EngineFacts(
        # People set engine_id, and set it alike; the instance makes it one of its kind.
        engine_id=f"{transfer.engine_id}-{vllm_config.instance_id}",
        loads=bool(transfer.is_kv_consumer) and not no_hits,
        dumps=bool(transfer.is_kv_producer),
        world_size=int(parallel.world_size),
        tp_size=int(parallel.tensor_parallel_size),
        pp_size=int(parallel.pipeline_parallel_size),
        block_tokens=targets[0].block_tokens,
        num_blocks=int(kv_cache_config.num_blocks),
        max_step_tokens=int(vllm_config.scheduler_config.max_num_batched_tokens),
        layer_names=base.layer_names,
        layout=base.layout,
        layout_name=base.layout_name,
        geometry=base.geometry,
        why_no_hits=no_hits,
        adapter_rules=adapter_rules(vllm_config),
        encoder_rules=encoder_rules(vllm_config),
        can_sleep=can_sleep(vllm_config.model_config),
        strands=strands,
        targets=targets,
        state_interval_tokens=state_interval_tokens(vllm_config, settings),
    )


def _refuse_what_is_unlike(
    vllm_config: Any, settings: Settings, layers: Sequence[CachedLayer]
) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    refuse_what_is_unlike(
        vllm_config,
        settings,
        device_type=current_platform.device_type,
        has_mla=any(isinstance(layer.spec, MLAAttentionSpec) for layer in layers),
        kv_dtypes=frozenset(layer.spec.dtype for layer in layers if layer.reach != STATE),
    )


def _refuse_states_inside_blocks(vllm_config: Any, strands: Sequence[StrandFacts]) -> None:
    unit = getattr(vllm_config.cache_config, "prefix_match_unit", None)
    sizes = {each.geometry.block_tokens for each in strands if each.has_states}
    if unit is not None and sizes - {int(unit)}:
        raise UnsupportedEngine(
            f"--prefix-match-unit {unit} makes vLLM keep the states of linear-attention or Mamba "
            "layers inside of blocks, where UCM can't store them: leave it out"
        )


def state_interval_tokens(vllm_config: Any, settings: Settings) -> int:
    """How far apart vLLM keeps states, 0 for the ends of prompts only; it spells "every block" as
    None."""
    interval = getattr(vllm_config.cache_config, "prefix_cache_retention_interval", 0)
    return settings.block_tokens if interval is None else int(interval)


def why_no_hits(vllm_config: Any) -> str:
    """Why this engine could not use a hit, empty if it can: a hit makes it compute the rest of a
    prompt on KV that it has not just computed, and some engines can't do that right.

    vLLM says so of a model by `is_prefix_caching_supported`. Where a platform, an attention backend
    or a way of attention forbids it, vLLM turns off both prefix caching and chunked prefill, which
    is the same computation. A user who turns off prefix caching alone still has chunked prefill:
    that engine can, and gets its hits.
    """
    model = vllm_config.model_config
    if not model.is_prefix_caching_supported:
        pooling = getattr(model.pooler_config, "seq_pooling_type", None)
        what = f"with {pooling} pooling" if pooling else "of this kind"
        return f"vLLM does not support prefix caching for a model {what}"
    if not (
        vllm_config.cache_config.enable_prefix_caching
        or vllm_config.scheduler_config.enable_chunked_prefill
    ):
        return "prefix caching and chunked prefill are both off in this engine"
    return ""


def adapter_rules(vllm_config: Any) -> str:
    """What of its settings decides how a LoRA adapter is applied, empty for vLLM's defaults."""
    lora = vllm_config.lora_config
    if lora is None:
        return ""
    rules: dict[str, object] = {}
    if lora.lora_dtype not in ("auto", None, vllm_config.model_config.dtype):
        rules["lora_dtype"] = dtype_name(lora.lora_dtype)
    # Older versions of vLLM don't have these.
    for name in ("target_modules", "enable_moe_shared_loras", "enable_mixed_moe_lora_format"):
        value = getattr(lora, name, None)
        if value:
            rules[name] = sorted(value) if isinstance(value, (list, tuple, set)) else value
    return canonical_json(rules).decode() if rules else ""


def _refuse_spread_engines(parallel: Any) -> None:
    if parallel.nnodes > 1:
        raise UnsupportedEngine(
            f"this engine is spread over {parallel.nnodes} nodes; UCM shares memory between ranks, "
            "so all ranks of one engine must be on one node"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise UnsupportedEngine("context parallel engines keep only a part of each block per rank")
