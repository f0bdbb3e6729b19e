"""Everything that UCM needs to know about the engine, read from vLLM's configuration in one place.

The only file that reads vLLM's configuration objects. An engine that can't be served correctly is
refused here, with one sentence; what passes is described by `EngineFacts`.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucm.config import Settings
from ucm.errors import UnsupportedEngine
from ucm.integration.vllm.views import LayoutKind
from ucm.store.namespace import Manifest, lora_digest, model_shape, weights_identity
from ucm.store.page import PageGeometry

logger = logging.getLogger(__name__)

_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
# The instruction sets of vLLM's CPU attention whose order inside a block is a strided view.
_CPU_STRIDED_ISAS = ("vec", "vec16")


@dataclass(frozen=True)
class EngineFacts:
    """One engine. `layer_names` are the attention layers of this process in order: all of them, or
    with pipeline parallelism a stage's. `loads` and `dumps` follow from kv_role."""

    engine_id: str
    loads: bool
    dumps: bool
    world_size: int
    tp_size: int
    pp_size: int
    block_tokens: int
    num_blocks: int
    max_step_tokens: int
    layer_names: tuple[str, ...]
    layout: LayoutKind
    layout_name: str
    geometry: PageGeometry


def engine_facts(vllm_config: Any, kv_cache_config: Any, settings: Settings) -> EngineFacts:
    """Raises UnsupportedEngine with the one sentence that the user gets to see."""
    parallel = vllm_config.parallel_config
    transfer = vllm_config.kv_transfer_config
    spec, layer_names = _only_group(kv_cache_config)
    _refuse_spread_engines(parallel)
    block_tokens = int(spec.block_size)
    if settings.block_tokens % block_tokens:
        raise UnsupportedEngine(
            f"block_tokens is {settings.block_tokens} and the engine's --block-size is "
            f"{block_tokens}: UCM's blocks must be a multiple of the engine's"
        )
    layout, layout_name = _layout(vllm_config, spec, settings)
    num_layers = (
        len(layer_names)
        if parallel.pipeline_parallel_size == 1
        else int(vllm_config.model_config.hf_text_config.num_hidden_layers)
    )
    return EngineFacts(
        # People set engine_id, and set it alike; the instance makes it one of its kind.
        engine_id=f"{transfer.engine_id}-{vllm_config.instance_id}",
        loads=bool(transfer.is_kv_consumer),
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
    )


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


def manifest(vllm_config: Any, facts: EngineFacts, settings: Settings) -> Manifest:
    """The namespace of this engine. Reads the model's folder: weight file headers and samples."""
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    geometry = facts.geometry
    return Manifest(
        block_tokens=settings.block_tokens,
        model_dtype=_dtype_name(model.dtype),
        kv_dtype=_kv_dtype(model, cache),
        kv_scales=_kv_scales(cache),
        num_layers=geometry.num_layers,
        num_kv_heads=geometry.num_kv_heads,
        k_size=geometry.k_size,
        v_size=geometry.v_size,
        layout=f"opaque:{facts.layout_name}" if facts.layout_name else "canonical",
        weights=_weights(vllm_config, settings),
        model_shape=model_shape(
            model.hf_text_config.to_dict(), max_model_len=int(model.max_model_len)
        ),
        quantization=_engine_quantization(model, settings),
        epoch=settings.epoch,
    )


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _kv_dtype(model: Any, cache: Any) -> str:
    return _dtype_name(model.dtype) if cache.cache_dtype == "auto" else str(cache.cache_dtype)


def _kv_scales(cache: Any) -> str:
    if not str(cache.cache_dtype).startswith(("fp8", "int8", "nvfp4")):
        return "none"
    if getattr(cache, "calculate_kv_scales", False):
        raise UnsupportedEngine(
            "--calculate-kv-scales makes this engine's KV depend on its first prompt; use the "
            "checkpoint's scales"
        )
    return "checkpoint"


def _engine_quantization(model: Any, settings: Settings) -> str:
    """Quantisation that the engine does itself. A checkpoint's own is part of its weights, and
    vLLM's name for it differs between platforms."""
    quantized = getattr(model.hf_config, "quantization_config", None) is not None
    if model.quantization is None or quantized or settings.model_id is not None:
        return "none"
    return str(model.quantization)


def _weights(vllm_config: Any, settings: Settings) -> str:
    if settings.model_id is not None:
        identity = f"model_id:{settings.model_id}"
    elif vllm_config.load_config.load_format == "dummy":
        raise UnsupportedEngine("--load-format dummy: the weights have no identity; set model_id")
    else:
        model = vllm_config.model_config
        identity = weights_identity(_folder(model.model, model.revision))
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    if draft is not None:
        # Draft layers may keep KV in the same pages.
        drafted = weights_identity(_folder(draft.model, draft.revision))
        identity = f"{identity}+{speculative.method}:{drafted}"
    return identity


def _folder(model: str, revision: str | None) -> Path:
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception as error:
        raise UnsupportedEngine(
            f"can't find the files of {model!r} to tell which weights these are ({error}); set "
            "model_id"
        ) from error


class AdapterDigests:
    """Digests of LoRA adapters, read once each."""

    def __init__(self) -> None:
        self._digests: dict[tuple[int, str], bytes | None] = {}

    def of(self, lora_request: Any) -> bytes | None:
        """None: the adapter's content can't be named, so its requests bypass the store."""
        if getattr(lora_request, "load_inplace", False):
            return None
        key = (int(lora_request.lora_int_id), str(lora_request.lora_path))
        if key not in self._digests:
            try:
                self._digests[key] = lora_digest(Path(lora_request.lora_path))
            except UnsupportedEngine as error:
                logger.warning("requests for this adapter bypass the store: %s", error)
                self._digests[key] = None
        return self._digests[key]
