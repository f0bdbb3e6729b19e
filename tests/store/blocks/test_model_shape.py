"""One config.json is one shape, whichever release of transformers has read it."""

from __future__ import annotations

import pytest

from ucm.store.blocks.model_shape import model_shape


@pytest.mark.parametrize(
    ("kind", "older", "newer"),
    [
        ("gpt_oss", {"swiglu_limit": 7.0}, {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}),
        ("gpt_oss", {}, {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}),
        ("llama4_text", {}, {"no_rope_layer_interval": 4}),
        ("qwen3_moe", {"num_experts": 128}, {"num_local_experts": 128}),
        (
            "deepseek_v2",
            {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
            {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "qk_head_dim": 192},
        ),
        (
            "mistral",
            {"hidden_size": 4096, "num_attention_heads": 32},
            {"hidden_size": 4096, "num_attention_heads": 32, "head_dim": 128},
        ),
    ],
)
def test_what_an_older_transformers_leaves_out_is_added(
    kind: str, older: dict[str, object], newer: dict[str, object]
) -> None:
    """4.57, and 5.5 to 5.14, of what 5.19 makes of one config.json."""
    kept = {"model_type": kind, **newer}
    assert model_shape({"model_type": kind, **older}) == kept == model_shape(kept)
    assert model_shape({"model_type": "qwen2", **older}) == {"model_type": "qwen2", **older}


def test_what_a_config_says_itself_is_not_replaced() -> None:
    said = {"model_type": "gpt_oss", "swiglu_limit": 10, "swiglu_alpha": 1.5}
    assert model_shape(said) == said
    said = {"model_type": "mistral", "hidden_size": 64, "num_attention_heads": 2, "head_dim": 48}
    assert model_shape(said) == said
