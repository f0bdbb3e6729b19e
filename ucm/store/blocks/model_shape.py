"""What of a model's configuration shapes its KV, spelled alike for all versions of transformers."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Final

from ucm.errors import UnsupportedEngine

# The fields of a Hugging Face text config that shape the KV of a token, besides the weights. A
# field that is listed here and doesn't matter to a model costs nothing; one that matters and is
# missing would let two different models share bytes.
_MODEL_SHAPE_FIELDS: Final = """
    architectures model_type
    hidden_size intermediate_size intermediate_size_mlp num_hidden_layers
    num_attention_heads num_key_value_heads num_kv_heads multi_query head_dim global_head_dim
    v_head_dim qk_nope_head_dim qk_rope_head_dim qk_head_dim q_lora_rank kv_lora_rank
    hidden_act hidden_activation activation_function hidden_size_per_layer_input swiglu_alpha
    swiglu_limit
    rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon norm_eps
    max_position_embeddings original_max_position_embeddings position_embedding_type alibi
    rotary_dim rotary_pct rotary_emb_base rope_interleave rope_local_base_freq mrope_section
    no_rope_layers no_rope_layer_interval
    sliding_window use_sliding_window max_window_layers layer_types sliding_window_pattern
    _sliding_window_pattern attention_chunk_size dual_chunk_attention_config
    num_kv_shared_layers index_topk index_n_heads index_head_dim indexer_types
    attention_bias qkv_bias use_qkv_bias bias clip_qkv attn_config attention_multiplier
    query_pre_attn_scalar attn_logit_softcapping attn_temperature_tuning attn_scale floor_scale
    use_qk_norm qk_norm qk_layernorm use_bidirectional_attention
    embedding_multiplier residual_multiplier scale_emb scale_depth dim_model_base
    parallel_attn use_parallel_residual new_decoder_architecture
    num_experts num_local_experts n_routed_experts n_shared_experts num_shared_experts
    num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size moe_layers
    first_k_dense_replace moe_layer_freq interleave_moe_layer_step decoder_sparse_step
    mlp_only_layers norm_topk_prob scoring_func topk_method n_group topk_group
    routed_scaling_factor
"""
MODEL_SHAPE_FIELDS: Final = frozenset(_MODEL_SHAPE_FIELDS.split())

# What transformers 4 keeps at the top level and in rope_scaling, transformers 5 keeps in
# rope_parameters: one spelling of it here, so that the two share.
_ROPE_FIELDS: Final = ("rope_theta", "partial_rotary_factor")

# What older releases of transformers have as constants in their code, by the type of the model.
_CONSTANTS: Final[Mapping[str, Mapping[str, object]]] = {
    "gpt_oss": {"swiglu_alpha": 1.702, "swiglu_limit": 7},
    "llama4_text": {"no_rope_layer_interval": 4},
}


def model_shape(
    hf_text_config: Mapping[str, object], *, max_model_len: int | None = None
) -> dict[str, object]:
    """The fields of `hf_text_config` that shape KV, normalised; absent ones are left out.

    `max_model_len` is the engine's: with LongRoPE, vLLM picks the short or the long factors by it,
    so two engines of one model share only when they pick the same.
    """
    shape = {
        name: _normal(hf_text_config[name], name)
        for name in sorted(MODEL_SHAPE_FIELDS & hf_text_config.keys())
        if hf_text_config[name] is not None
    }
    _add_what_older_ones_leave_out(shape)
    rope = _rope(hf_text_config)
    if rope:
        shape["rope"] = rope
    original_len = rope.get(
        "original_max_position_embeddings", shape.get("original_max_position_embeddings")
    )
    if rope.get("rope_type") == "longrope" and max_model_len and isinstance(original_len, int):
        shape["longrope_factors"] = "long" if max_model_len > original_len else "short"
    return shape


def _add_what_older_ones_leave_out(shape: MutableMapping[str, object]) -> None:
    """One config.json is read by vLLM 0.23 and by 0.33, with whatever transformers they have: as
    the newest that was read spells it, so that namespaces stay."""
    kind = shape.get("model_type")
    for name, value in _CONSTANTS.get(str(kind), {}).items():
        shape.setdefault(name, value)
    if kind == "qwen3_moe" and "num_experts" in shape:
        shape.setdefault("num_local_experts", shape.pop("num_experts"))
    if kind == "deepseek_v2":
        nope, rope = shape.get("qk_nope_head_dim"), shape.get("qk_rope_head_dim")
        if isinstance(nope, int) and isinstance(rope, int):
            shape.setdefault("qk_head_dim", nope + rope)
    if kind == "mistral":
        hidden, heads = shape.get("hidden_size"), shape.get("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int):
            shape.setdefault("head_dim", hidden // heads)


def _rope(config: Mapping[str, object]) -> dict[str, object]:
    rope: dict[str, object] = {
        name: config[name] for name in _ROPE_FIELDS if config.get(name) is not None
    }
    for name in ("rope_scaling", "rope_parameters"):
        parameters = config.get(name)
        if isinstance(parameters, Mapping):
            rope |= {key: value for key, value in parameters.items() if value is not None}
    if not rope:
        return {}
    per_layer_type = any(isinstance(value, Mapping) for value in rope.values())
    legacy_type = rope.pop("type", None)
    if not per_layer_type:
        rope.setdefault("rope_type", legacy_type or "default")
    normal = _normal(rope, "rope")
    assert isinstance(normal, dict)
    return normal


def _normal(value: object, name: str) -> object:
    """JSON that doesn't depend on whether somebody wrote 10000 or 10000.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        return value
    if isinstance(value, Mapping):
        items = sorted((str(key), item) for key, item in value.items() if item is not None)
        return {key: _normal(item, f"{name}.{key}") for key, item in items}
    if isinstance(value, (list, tuple)):
        return [_normal(item, name) for item in value]
    raise UnsupportedEngine(
        f"the model config's {name} is {value!r}, which can't be named in a namespace"
    )
