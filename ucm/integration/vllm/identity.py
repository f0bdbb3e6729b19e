"""Which namespace an engine is in, read from vLLM's configuration: everything that shapes its KV.

What two engines spell differently and compute alike has one spelling here; what they spell alike
and compute differently has two.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from ucm.config.settings import Settings
from ucm.errors import UnsupportedEngine
from ucm.integration.copies.state_field import StateField
from ucm.integration.engine.facts import EngineFacts, StrandFacts
from ucm.integration.engine.model_files import model_place
from ucm.integration.vllm.kv_specs import layer_index
from ucm.store.blocks.model_shape import model_shape
from ucm.store.blocks.namespace import MANIFEST_FORMAT, STRANDS_FORMAT, Manifest
from ucm.store.blocks.weights import weights_identity

# Ways of speculation that keep no KV of their own: they guess from the text, or from the target's
# last layer.
_DRAFTS_WITHOUT_KV: Final = frozenset({"ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"})


def manifest(vllm_config: Any, facts: EngineFacts, settings: Settings, *, epoch: int) -> Manifest:
    """The namespace of this engine. Reads the model's folder: weight file headers and samples."""
    geometry = facts.geometry
    # Which layers there are says all of a model whose layers are alike and need every token.
    has_strands = len(facts.strands) > 1 or not facts.is_plain
    return msgspec.structs.replace(
        manifest_without_strands(vllm_config, settings, epoch=epoch),
        format_version=STRANDS_FORMAT if has_strands else MANIFEST_FORMAT,
        num_layers=geometry.num_layers,
        num_kv_heads=geometry.num_kv_heads,
        k_size=geometry.k_size,
        v_size=geometry.v_size,
        layout=_layout(facts.layout_name),
        strands=[_strand(strand) for strand in facts.strands] if has_strands else msgspec.UNSET,
    )


def manifest_without_strands(vllm_config: Any, settings: Settings, *, epoch: int) -> Manifest:
    """What is known of an engine's namespace before it has made its layers: that of one with
    several strands or with windows, `without_strands`."""
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    return Manifest(
        format_version=STRANDS_FORMAT,
        block_tokens=settings.block_tokens,
        model_dtype=dtype_name(model.dtype),
        kv_dtype=_kv_dtype(model, cache),
        kv_scales=_kv_scales(cache),
        num_layers=0,
        num_kv_heads=0,
        k_size=0,
        v_size=0,
        layout="",
        weights=_weights(vllm_config, settings),
        model_shape=model_shape(
            model.hf_text_config.to_dict(), max_model_len=int(model.max_model_len)
        ),
        quantization=_engine_quantization(model, settings),
        epoch=epoch,
        strands=[],
    )


def _strand(strand: StrandFacts) -> dict[str, object]:
    """What must agree of it, on its own: engines differ in which layers they take for a strand."""
    geometry = strand.geometry
    return {
        "name": strand.name,
        "reach": str(strand.reach),
        "layers": [layer_index(name) for name in strand.layer_names],
        "num_layers": geometry.num_layers,
        "num_kv_heads": geometry.num_kv_heads,
        "k_size": geometry.k_size,
        "v_size": geometry.v_size,
        "item_bytes": geometry.item_bytes,
        "layout": _layout(strand.layout_name),
        **({"fields": [_state_field(field) for field in strand.fields]} if strand.fields else {}),
    }


def _state_field(field: StateField) -> dict[str, object]:
    num_layers, num_heads, num_rows, num_columns = field.geometry.shape
    return {
        "name": field.name,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_rows": num_rows,
        "num_columns": num_columns,
        "dtype": field.dtype,
    }


def _layout(layout_name: str) -> str:
    return f"opaque:{layout_name}" if layout_name else "canonical"


def dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _kv_dtype(model: Any, cache: Any) -> str:
    """vLLM's "fp8" is fp8_e4m3, whose bytes mean other numbers on AMD's older accelerators."""
    if cache.cache_dtype == "auto":
        return dtype_name(model.dtype)
    name = str(cache.cache_dtype)
    if name not in ("fp8", "fp8_e4m3"):
        return name
    from vllm.platforms import current_platform

    return "fp8_fnuz" if current_platform.is_fp8_fnuz() else "fp8"


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
    """What the engine does to weights itself: a checkpoint's own quantisation is part of its
    weights, and vLLM's name for it differs between platforms. Pictures are seen by an encoder that
    may compute in a type of its own."""
    quantized = getattr(model.hf_config, "quantization_config", None) is not None
    given = model.quantization is None or quantized or settings.model_id is not None
    name = "none" if given else str(model.quantization)
    encoder = getattr(getattr(model, "multimodal_config", None), "mm_encoder_attn_dtype", None)
    return name if encoder is None else f"{name}+encoder:{dtype_name(encoder)}"


def _weights(vllm_config: Any, settings: Settings) -> str:
    load_format = str(vllm_config.load_config.load_format)
    if settings.model_id is not None:
        identity = f"model_id:{settings.model_id}"
    elif load_format == "dummy":
        raise UnsupportedEngine("--load-format dummy: the weights have no identity; set model_id")
    else:
        model = vllm_config.model_config
        identity = _identity(model.model, model.revision, load_format)
    draft = draft_with_kv(vllm_config)
    if draft is not None:
        drafted = _identity(draft.model, draft.revision, load_format)
        identity = f"{identity}+{vllm_config.speculative_config.method}:{drafted}"
    return identity


def draft_with_kv(vllm_config: Any) -> Any | None:
    """The model of a draft whose layers may keep KV, and in the same pages."""
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    return None if draft is None or speculative.method in _DRAFTS_WITHOUT_KV else draft


def _identity(model: str, revision: str | None, load_format: str) -> str:
    return weights_identity(model_place(model, revision), load_format=load_format)
