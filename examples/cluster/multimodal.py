"""A small model that sees: LLaVA with seeded random weights, a CLIP tower before a Qwen2.

Every image becomes as many copies of one token, whatever is in it: only what the tower makes of it
tells two images apart.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from examples.cluster.models import (
    END,
    SHAPES,
    SPECIAL_TOKENS,
    made_once,
    model_config,
    random_weights,
    token_id,
    write_json,
    write_tokenizer,
)

if TYPE_CHECKING:
    from torch import Tensor

IMAGE = "<image>"
# Pixels of a side. Other sizes are brought to this one first.
IMAGE_SIZE = 192
_PATCH_SIZE = 16
# A block of 128 tokens can lie inside an image.
IMAGE_TOKENS = (IMAGE_SIZE // _PATCH_SIZE) ** 2

# vLLM's own code for LLaVA imports torchvision, whose native parts don't load beside the CPU build;
# through transformers' code, PIL is enough.
SERVER_ARGS = ("--model-impl", "transformers")

_LANGUAGE = SHAPES["tiny"]
_TOWER_LAYERS = 2
_TOWER_HIDDEN = 64
_TOWER_INTERMEDIATE = 128

# The parts of a message in their order, images where they stand.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_image_model(directory: Path, *, seed: int = 0) -> Path:
    """Make the model under `directory`, or find the one made earlier; return its folder."""

    def write(folder: Path) -> None:
        _write_image_model(folder, seed=seed)

    return made_once(directory, f"image-seed{seed}", write)


def _write_image_model(folder: Path, *, seed: int) -> None:
    from safetensors.torch import save_file

    special_tokens = (*SPECIAL_TOKENS, IMAGE)
    tokenizer = write_tokenizer(folder, chat_template=_CHAT_TEMPLATE, special_tokens=special_tokens)
    vocab_size, end_id = tokenizer.get_vocab_size(), token_id(tokenizer, END)
    image_id = token_id(tokenizer, IMAGE)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": model_config(_LANGUAGE, vocab_size=vocab_size, end_id=end_id),
        "vision_config": _tower_config(),
        "image_token_index": image_id,
        "image_seq_length": IMAGE_TOKENS,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": end_id})
    _write_processor(folder)
    language = random_weights(_LANGUAGE, vocab_size=vocab_size, seed=seed)
    weights = {_placed(name): tensor for name, tensor in language.items()}
    weights.update(_seeing_weights(seed=seed))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _placed(name: str) -> str:
    """Where LLaVA keeps a weight of its language model."""
    return name.replace("model.", "model.language_model.", 1)


def _tower_config() -> dict[str, object]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": _TOWER_HIDDEN,
        "intermediate_size": _TOWER_INTERMEDIATE,
        "num_hidden_layers": _TOWER_LAYERS,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": _PATCH_SIZE,
        "projection_dim": _TOWER_HIDDEN,
    }


def _write_processor(folder: Path) -> None:
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "patch_size": _PATCH_SIZE,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": IMAGE_SIZE},
            "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        },
    )


def _seeing_weights(*, seed: int) -> dict[str, Tensor]:
    """Of the tower and of the projector between it and the language model."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        """Keeps the magnitude of what it is multiplied with: the language model is to notice."""
        values = torch.randn(*size, generator=generator, dtype=torch.float32)
        return (values / math.sqrt(math.prod(size[1:]))).to(torch.bfloat16)

    weights: dict[str, Tensor] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        weights[f"{name}.weight"] = normal(outputs, inputs)
        weights[f"{name}.bias"] = torch.zeros(outputs, dtype=torch.bfloat16)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = torch.ones(_TOWER_HIDDEN, dtype=torch.bfloat16)
        weights[f"{name}.bias"] = torch.zeros(_TOWER_HIDDEN, dtype=torch.bfloat16)

    tower, hidden = "model.vision_tower", _TOWER_HIDDEN
    embeddings = f"{tower}.embeddings"
    weights[f"{embeddings}.class_embedding"] = normal(1, hidden)[0]
    weights[f"{embeddings}.patch_embedding.weight"] = normal(hidden, 3, _PATCH_SIZE, _PATCH_SIZE)
    weights[f"{embeddings}.position_embedding.weight"] = normal(IMAGE_TOKENS + 1, hidden)
    norm(f"{tower}.pre_layrnorm")
    for index in range(_TOWER_LAYERS):
        layer = f"{tower}.encoder.layers.{index}"
        for name in ("q", "k", "v", "out"):
            linear(f"{layer}.self_attn.{name}_proj", hidden, hidden)
        linear(f"{layer}.mlp.fc1", _TOWER_INTERMEDIATE, hidden)
        linear(f"{layer}.mlp.fc2", hidden, _TOWER_INTERMEDIATE)
        norm(f"{layer}.layer_norm1")
        norm(f"{layer}.layer_norm2")
    norm(f"{tower}.post_layernorm")
    linear("model.multi_modal_projector.linear_1", _LANGUAGE.hidden, hidden)
    linear("model.multi_modal_projector.linear_2", _LANGUAGE.hidden, _LANGUAGE.hidden)
    return weights
