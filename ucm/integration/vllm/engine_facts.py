"""Everything that UCM needs to know about the engine, read from vLLM's configuration in one place.

Only this file and `identity` read vLLM's configuration objects. An engine that can't be served
correctly is refused here, with one sentence; what passes is described by `EngineFacts`.
"""

from __future__ import annotations

import re
from typing import Any

from ucm.config.settings import Settings
from ucm.errors import UnsupportedEngine
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.vllm.device_facts import can_sleep, refuse_layerwise_with_micro_batches
from ucm.store.blocks.canonical_json import canonical_json
from ucm.store.blocks.page_layout import PageGeometry

_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
# The instruction sets of vLLM's CPU attention whose order inside a block is a strided view.
_CPU_STRIDED_ISAS = ("vec", "vec16")


def engine_facts(vllm_config: Any, kv_cache_config: Any, settings: Settings) -> EngineFacts:
    """Raises UnsupportedEngine with the one sentence that the user gets to see."""
    parallel = vllm_config.parallel_config
    transfer = vllm_config.kv_transfer_config
    spec, layer_names = _only_group(kv_cache_config)
    _refuse_spread_engines(parallel)
    refuse_layerwise_with_micro_batches(parallel, settings)
    block_tokens = int(spec.block_size)
    if settings.block_tokens % block_tokens:
        raise UnsupportedEngine(
            f"block_tokens is {settings.block_tokens} and the engine's --block-size is "
            f"{block_tokens}: UCM's blocks must be a multiple of the engine's"
        )
    layout, layout_name = _layout(vllm_config, spec, settings)
    no_hits = why_no_hits(vllm_config)
    num_layers = (
        len(layer_names)
        if parallel.pipeline_parallel_size == 1
        else int(vllm_config.model_config.hf_text_config.num_hidden_layers)
    )
    return EngineFacts(
        # People set engine_id, and set it alike; the instance makes it one of its kind.
        engine_id=f"{transfer.engine_id}-{vllm_config.instance_id}",
        loads=bool(transfer.is_kv_consumer) and not no_hits,
        dumps=bool(transfer.is_kv_producer),
        world_size=int(parallel.world_size),
        tp_size=int(parallel.tensor_parallel_size),
        pp_size=int(parallel.pipeline_parallel_size),
        block_tokens=block_tokens,
        num_blocks=int(kv_cache_config.num_blocks),
        max_step_tokens=int(vllm_config.scheduler_config.max_num_batched_tokens),
        layer_names=layer_names,
        layout=layout,
        layout_name=layout_name,
        geometry=_geometry(vllm_config, spec, settings, layout, num_layers),
        why_no_hits=no_hits,
        adapter_rules=_adapter_rules(vllm_config),
        can_sleep=can_sleep(vllm_config.model_config),
    )


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


def _adapter_rules(vllm_config: Any) -> str:
    lora = vllm_config.lora_config
    if lora is None:
        return ""
    rules: dict[str, object] = {}
    if lora.lora_dtype not in ("auto", None, vllm_config.model_config.dtype):
        rules["lora_dtype"] = str(lora.lora_dtype).removeprefix("torch.")
    # Older versions of vLLM don't have these.
    for name in ("target_modules", "enable_moe_shared_loras", "enable_mixed_moe_lora_format"):
        value = getattr(lora, name, None)
        if value:
            rules[name] = sorted(value) if isinstance(value, (list, tuple, set)) else value
    return canonical_json(rules).decode() if rules else ""


def _only_group(kv_cache_config: Any) -> tuple[Any, tuple[str, ...]]:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise UnsupportedEngine(
            f"this model has {len(groups)} KV cache groups (hybrid attention or Mamba layers) and "
            "UCM serves models with one"
        )
    spec = groups[0].kv_cache_spec
    specs = getattr(spec, "kv_cache_specs", None)
    if specs is not None:
        spec = next(iter(specs.values()))
        if any(other != spec for other in specs.values()):
            raise UnsupportedEngine("this model's layers differ in the shape of their KV cache")
    if type(spec) not in (FullAttentionSpec, MLAAttentionSpec):
        raise UnsupportedEngine(
            f"this model's KV cache is a {type(spec).__name__}; UCM serves full attention and MLA"
        )
    if getattr(spec, "non_causal", False):
        raise UnsupportedEngine(
            "this model's attention is not causal: a token's KV depends on those that follow it"
        )
    if spec.state_content_bytes is not None or spec.tokens_per_state != 1:
        raise UnsupportedEngine("this KV cache dtype packs its own scales or states into a block")
    return spec, tuple(sorted(groups[0].layer_names, key=layer_index))


def layer_index(layer_name: str) -> int:
    """The number in a name like `model.layers.7.self_attn.attn`."""
    numbers = _LAYER_INDEX.findall(layer_name)
    if len(numbers) != 1:
        raise UnsupportedEngine(f"can't tell the layer's number from its name {layer_name!r}")
    return int(numbers[0])


def _refuse_spread_engines(parallel: Any) -> None:
    if parallel.nnodes > 1:
        raise UnsupportedEngine(
            f"this engine is spread over {parallel.nnodes} nodes; UCM shares memory between ranks, "
            "so all ranks of one engine must be on one node"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise UnsupportedEngine("context parallel engines keep only a part of each block per rank")


def _layout(vllm_config: Any, spec: Any, settings: Settings) -> tuple[LayoutKind, str]:
    """How the backend orders bytes inside a block, and a name for it (empty: canonical)."""
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    device = current_platform.device_type
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    place = f"block{spec.block_size}:tp{tp_size}"
    if device == "cpu" and not isinstance(spec, MLAAttentionSpec):
        isa = _cpu_isa(vllm_config, spec)
        if isa in _CPU_STRIDED_ISAS and settings.kv_layout == "auto":
            return LayoutKind.CPU_VEC, ""
        return LayoutKind.OPAQUE, f"cpu:{isa}:{place}"
    if settings.kv_layout == "opaque":
        layout = vllm_config.cache_config.kv_cache_layout
        if layout is None:
            raise UnsupportedEngine(
                "kv_layout is opaque, and vLLM does not say which layout it uses: its bytes can't "
                "be named"
            )
        return LayoutKind.OPAQUE, f"{device}:{layout}:{place}"
    return (
        LayoutKind.MLA if isinstance(spec, MLAAttentionSpec) else LayoutKind.PACKED,
        "",
    )


def _cpu_isa(vllm_config: Any, spec: Any) -> str:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return str(
        _get_attn_isa(
            vllm_config.model_config.dtype,
            spec.block_size,
            spec.head_size,
            vllm_config.cache_config.cache_dtype,
        )
    )


def _geometry(
    vllm_config: Any, spec: Any, settings: Settings, layout: LayoutKind, num_layers: int
) -> PageGeometry:
    item_bytes = int(spec.dtype.itemsize)
    v_size = 0 if layout is LayoutKind.MLA else int(spec.head_size_v)
    if layout is LayoutKind.OPAQUE:
        return PageGeometry(
            num_layers=num_layers,
            num_kv_heads=int(vllm_config.parallel_config.tensor_parallel_size),
            block_tokens=settings.block_tokens,
            k_size=int(spec.page_size_bytes),
            v_size=0,
            item_bytes=1,
            unit_tokens=int(spec.block_size),
        )
    heads = 1 if layout is LayoutKind.MLA else vllm_config.model_config.get_total_num_kv_heads()
    return PageGeometry(
        num_layers=num_layers,
        num_kv_heads=int(heads),
        block_tokens=settings.block_tokens,
        k_size=int(spec.head_size),
        v_size=v_size,
        item_bytes=item_bytes,
    )
