"""Small models whose layers need unlike parts of a prompt, with seeded random weights.

Made by transformers from a configuration, so that names and shapes of weights are the model's own.
Weights are wide, as those of the tiny model are: outputs depend on what attention reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from examples.cluster.models import END, MAX_POSITION, made_once, token_id, write_tokenizer

_CHAT_TEMPLATE: Final = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_VOCABULARIES: Final = frozenset({"vocab_size_per_layer_input"})
_LOCAL, _GLOBAL, _STATE = "sliding_attention", "full_attention", "linear_attention"
# vLLM's CPU kernel can't keep a state that lies inside a step: steps end with each block.
_BLOCK_BY_BLOCK: Final = ("--max-num-batched-tokens", "256")
# What a state loses with each token is exp(A_log) of it, about. With the usual value it has
# forgotten the tokens before a boundary soon behind it, and a wrong state would not show.
_SLOW_DECAY: Final = -5.0


@dataclass(frozen=True)
class HybridModel:
    """`config` names a class of transformers and its arguments; `flags` are what vLLM needs for it
    here. `window` is that of its local layers; one that has none has states instead. `block_size`
    is the store's, and the engine's `--block-size` as well where that is not given: with states
    they must agree, and vLLM makes larger ones of some layers. `fills` are what vectors are made
    of, by the ends of their names."""

    name: str
    config: str
    fields: Mapping[str, Any]
    window: int = 0
    flags: tuple[str, ...] = ()
    dtype: str = "float32"
    block_size: int = 128
    engine_block_size: int = 0
    fills: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.engine_block_size:
            object.__setattr__(self, "engine_block_size", self.block_size)

    @property
    def has_states(self) -> bool:
        return not self.window

    @property
    def steps_are_blocks(self) -> bool:
        return self.flags == _BLOCK_BY_BLOCK

    @property
    def is_exact(self) -> bool:
        return self.dtype == "float32"

    def hit_tokens(self, num_prompt: int) -> int:
        """What there is to load of a prompt. A window's last token is computed again; a state is
        that after a whole block, and before the last token."""
        if self.has_states:
            return (num_prompt - 1) // self.block_size * self.block_size
        return min(num_prompt // self.block_size * self.block_size, num_prompt - 1)


_COMMON: Final = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITION,
    "tie_word_embeddings": False,
}


def _without(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {other: value for other, value in fields.items() if other != name}


# The second half has the KV of the first, and each layer an embedding of its own.
_SHARED_KV: Final = {
    **_COMMON,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 0,
    "num_hidden_layers": 10,
    "num_kv_shared_layers": 5,
    "sliding_window": 256,
    "layer_types": ([_LOCAL] * 4 + [_GLOBAL]) * 2,
    "tie_word_embeddings": True,
}


def _gemma3(window: int) -> HybridModel:
    return HybridModel(
        name=f"gemma3-w{window}",
        config="Gemma3TextConfig",
        window=window,
        fields={
            **_COMMON,
            "num_hidden_layers": 6,
            "sliding_window": window,
            "layer_types": [_LOCAL] * 5 + [_GLOBAL],
            "query_pre_attn_scalar": 32,
        },
    )


def _mistral(window: int) -> HybridModel:
    """All of its layers have the window."""
    return HybridModel(
        name=f"mistral-w{window}",
        config="MistralConfig",
        window=window,
        fields={**_COMMON, "num_hidden_layers": 4, "sliding_window": window},
    )


MODELS: Final = {
    model.name: model
    for model in (
        _gemma3(256),
        _gemma3(129),
        _mistral(256),
        _mistral(129),
        HybridModel(
            name="gemma2",
            config="Gemma2Config",
            window=256,
            fields={
                **_COMMON,
                "num_hidden_layers": 4,
                "sliding_window": 256,
                "query_pre_attn_scalar": 32,
                "tie_word_embeddings": True,
            },
        ),
        HybridModel(
            name="gemma3n",
            config="Gemma3nTextConfig",
            window=256,
            fields={
                **_SHARED_KV,
                "laurel_rank": 16,
                "activation_sparsity_pattern": [0.5] * 2 + [0.0] * 8,
            },
        ),
        HybridModel(
            name="gemma4",
            config="Gemma4TextConfig",
            window=256,
            # Layers with full attention have larger heads, so blocks of the others are twice as
            # long.
            engine_block_size=64,
            fields={**_SHARED_KV, "global_head_dim": 64},
        ),
        HybridModel(
            name="gpt-oss",
            config="GptOssConfig",
            window=128,
            fields={
                **_COMMON,
                "num_hidden_layers": 4,
                "sliding_window": 128,
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
                "head_dim": 64,
                "hidden_size": 128,
                "intermediate_size": 128,
                "layer_types": [_LOCAL, _GLOBAL] * 2,
                "rope_scaling": None,
            },
        ),
        HybridModel(
            name="cohere2",
            config="Cohere2Config",
            window=256,
            fields={**_COMMON, "num_hidden_layers": 4, "sliding_window": 256},
        ),
        HybridModel(
            name="ministral",
            config="MinistralConfig",
            window=256,
            fields={
                **_COMMON,
                "num_hidden_layers": 4,
                "sliding_window": 256,
                "layer_types": [_LOCAL] * 3 + [_GLOBAL],
            },
        ),
        HybridModel(
            name="llama4",
            config="Llama4TextConfig",
            window=512,
            fields={
                **_COMMON,
                "num_hidden_layers": 4,
                "attention_chunk_size": 512,
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
                "intermediate_size_mlp": 256,
                "no_rope_layers": [1, 1, 1, 0],
                "moe_layers": [],
                "interleave_moe_layer_step": 0,
                "attn_temperature_tuning": False,
            },
        ),
        HybridModel(
            name="qwen3-next",
            config="Qwen3NextConfig",
            # With larger heads a block has room for the states also where vLLM keeps them in
            # float32, as on some processors.
            fields={
                **_COMMON,
                "head_dim": 64,
                "num_hidden_layers": 4,
                "layer_types": [_STATE] * 3 + [_GLOBAL],
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 64,
                "linear_value_head_dim": 64,
                # All of them: with a choice a rounding error would now and then make another one.
                "num_experts": 2,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 128,
                "shared_expert_intermediate_size": 128,
            },
            dtype="bfloat16",
            block_size=256,
            # Sharper attention: what it reads must show in spite of rounding errors.
            fills={"q_norm.weight": 3.0},
        ),
        HybridModel(
            name="granite4",
            config="GraniteMoeHybridConfig",
            fields={
                **_without(_COMMON, "head_dim"),
                "num_hidden_layers": 4,
                "layer_types": [_STATE] * 2 + [_GLOBAL, _STATE],
                "shared_intermediate_size": 128,
                "num_local_experts": 0,
                "num_experts_per_tok": 0,
                "attention_multiplier": 0.2,
                "mamba_n_heads": 8,
                "mamba_n_groups": 1,
                "mamba_d_state": 64,
            },
            flags=_BLOCK_BY_BLOCK,
            block_size=256,
        ),
        HybridModel(
            name="falcon-h1",
            config="FalconH1Config",
            # What attention says is added to what the states say, and must not drown in it.
            fields={
                "attention_out_multiplier": 8.0,
                **_COMMON,
                "num_hidden_layers": 2,
                "mamba_d_ssm": 256,
                "mamba_n_heads": 8,
                "mamba_n_groups": 2,
                "mamba_d_state": 64,
            },
            flags=_BLOCK_BY_BLOCK,
            block_size=256,
        ),
        HybridModel(
            name="nemotron-h",
            config="NemotronHConfig",
            fields={
                **_COMMON,
                "layers_block_type": [_STATE, "mlp", _GLOBAL, _STATE, "mlp"],
                "mamba_num_heads": 8,
                "mamba_head_dim": 32,
                "n_groups": 2,
                "ssm_state_size": 64,
            },
            flags=_BLOCK_BY_BLOCK,
            block_size=256,
        ),
    )
}


def make_hybrid(directory: Path, model: HybridModel) -> Path:
    """Makes it, or finds the one made earlier."""
    return made_once(directory, model.name, lambda folder: _write(folder, model))


def _write(folder: Path, model: HybridModel) -> None:
    import torch
    import transformers

    tokenizer = write_tokenizer(folder, chat_template=_CHAT_TEMPLATE)
    end = token_id(tokenizer, END)
    sizes = dict.fromkeys(_VOCABULARIES & model.fields.keys(), tokenizer.get_vocab_size())
    config = getattr(transformers, model.config)(
        **{**model.fields, **sizes},
        vocab_size=tokenizer.get_vocab_size(),
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        torch_dtype="float32",
    )
    fills = {"A_log": _SLOW_DECAY, "dt_bias": 0.0, **model.fills}
    torch.manual_seed(0)
    with torch.device("cpu"):
        made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.dim() >= 2:
                weight.normal_(std=1.6 / math.sqrt(weight.shape[-1]))
            elif "sinks" in name:
                weight.normal_()
            else:
                for end, value in fills.items():
                    if name.endswith(end):
                        weight.fill_(value)
    made.save_pretrained(folder)
