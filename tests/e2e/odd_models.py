"""Small models that are not like the others: with MLA, and LoRA adapters for the tiny one."""

from __future__ import annotations

from pathlib import Path

from examples.cluster.models import (
    END,
    MAX_POSITION,
    SHAPES,
    made_once,
    token_id,
    write_json,
    write_tokenizer,
)

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_TARGETS = ("q_proj", "v_proj")
_RANK = 8


def make_mla_model(directory: Path) -> Path:
    """DeepSeek-V2 without experts, seeded random weights."""
    return made_once(directory, "mla", _write_mla_model)


def _write_mla_model(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tokenizer = write_tokenizer(folder, chat_template=_CHAT_TEMPLATE)
    vocab, hidden, heads = tokenizer.get_vocab_size(), 128, 4
    # The sizes that vLLM has kernels for.
    rank, nope, rope, value = 512, 32, 64, 32
    layers, wide = 2, 256
    config = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_hidden_layers": layers,
        "first_k_dense_replace": layers,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "moe_layer_freq": 1,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": None,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "vocab_size": vocab,
        "max_position_embeddings": MAX_POSITION,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": token_id(tokenizer, END),
        "torch_dtype": "float32",
    }
    write_json(folder / "config.json", config)
    generator = torch.Generator().manual_seed(0)
    weights = {"model.embed_tokens.weight": torch.randn(vocab, hidden, generator=generator)}
    sizes = {"lm_head": (vocab, hidden)}
    for index in range(layers):
        layer = f"model.layers.{index}"
        sizes |= {
            f"{layer}.self_attn.q_proj": (heads * (nope + rope), hidden),
            f"{layer}.self_attn.kv_a_proj_with_mqa": (rank + rope, hidden),
            f"{layer}.self_attn.kv_b_proj": (heads * (nope + value), rank),
            f"{layer}.self_attn.o_proj": (hidden, heads * value),
            f"{layer}.mlp.gate_proj": (wide, hidden),
            f"{layer}.mlp.up_proj": (wide, hidden),
            f"{layer}.mlp.down_proj": (hidden, wide),
        }
        weights[f"{layer}.self_attn.kv_a_layernorm.weight"] = torch.ones(rank)
        weights[f"{layer}.input_layernorm.weight"] = torch.ones(hidden)
        weights[f"{layer}.post_attention_layernorm.weight"] = torch.ones(hidden)
    weights["model.norm.weight"] = torch.ones(hidden)
    for name, (rows, columns) in sizes.items():
        weights[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * columns**-0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_adapter(folder: Path, *, seed: int) -> Path:
    """A LoRA adapter for the tiny model that changes its answers. One that is there is overwritten
    in place, with files of the same sizes."""
    import torch
    from safetensors.torch import save

    shape = SHAPES["tiny"]
    widths = {"q_proj": shape.hidden, "v_proj": shape.num_kv_heads * shape.head_size}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for index in range(shape.num_layers):
        for target in _TARGETS:
            name = f"base_model.model.model.layers.{index}.self_attn.{target}"
            weights[f"{name}.lora_A.weight"] = torch.randn(_RANK, shape.hidden, generator=generator)
            weights[f"{name}.lora_B.weight"] = 0.05 * torch.randn(
                widths[target], _RANK, generator=generator
            )
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "r": _RANK,
        "lora_alpha": _RANK,
        "target_modules": list(_TARGETS),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
    }
    write_json(folder / "adapter_config.json", config)
    (folder / "adapter_model.safetensors").write_bytes(save(weights))
    return folder
