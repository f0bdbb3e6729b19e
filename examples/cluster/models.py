"""Small models made on the spot: seeded random weights that any vLLM serves like a real model.

They speak nonsense, but deterministic nonsense: their outputs depend on every byte of the KV
cache, which is what a test of a KV cache wants.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

Size = Literal["tiny", "small", "mid"]

MAX_POSITION = 8192

_SENTENCE = "A page that one machine has computed need not be computed by another machine again. "
END = "<|end|>"
SPECIAL_TOKENS = (END, "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The numbers that make a Qwen2 model."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.num_heads

    @property
    def initializer_range(self) -> float:
        """Wide enough for attention to choose: with the usual 0.02 it is almost uniform, outputs
        hardly depend on the KV cache, and answers end in one token repeated."""
        return 1.6 / math.sqrt(self.hidden)


SHAPES: dict[Size, Shape] = {
    "tiny": Shape(num_layers=4, hidden=256, intermediate=512, num_heads=4, num_kv_heads=2),
    # What the demo uses: computing 3500 tokens takes a second of one core, loading them does not.
    "small": Shape(num_layers=8, hidden=512, intermediate=1408, num_heads=8, num_kv_heads=4),
    # 32 KiB of KV per token in bfloat16, so 4 MiB per block of 128 tokens.
    "mid": Shape(num_layers=16, hidden=1024, intermediate=2816, num_heads=8, num_kv_heads=4),
}


def make_model(directory: Path | str, size: Size = "tiny", *, seed: int = 0) -> Path:
    """Make the model under `directory`, or find the one made earlier; return its folder."""

    def write(folder: Path) -> None:
        _write_model(folder, SHAPES[size], seed=seed)

    return made_once(Path(directory), f"{size}-seed{seed}", write)


def made_once(directory: Path, name: str, write: Callable[[Path], None]) -> Path:
    """The folder `name` of `directory`; `write` fills it if it isn't there yet.

    It appears with one rename, so an interrupted or concurrent call leaves no half model.
    """
    directory = directory.absolute()
    target = directory / name
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / ".lock"):
        if not target.is_dir():
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=directory))
            try:
                scratch.chmod(0o755)
                write(scratch)
                scratch.rename(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _write_model(folder: Path, shape: Shape, *, seed: int) -> None:
    from safetensors.torch import save_file

    tokenizer = write_tokenizer(folder, chat_template=_CHAT_TEMPLATE)
    vocab_size, end_id = tokenizer.get_vocab_size(), token_id(tokenizer, END)
    write_json(folder / "config.json", model_config(shape, vocab_size=vocab_size, end_id=end_id))
    write_json(folder / "generation_config.json", {"eos_token_id": end_id})
    weights = random_weights(shape, vocab_size=vocab_size, seed=seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(
    folder: Path, *, chat_template: str, special_tokens: Sequence[str] = SPECIAL_TOKENS
) -> Tokenizer:
    tokenizer = _train_tokenizer(special_tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": END,
            "model_max_length": MAX_POSITION,
            "clean_up_tokenization_spaces": False,
            "chat_template": chat_template,
        },
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _train_tokenizer(special_tokens: Sequence[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The trainer wants to see a pair twice before it merges it.
    tokenizer.train_from_iterator([_SENTENCE, _SENTENCE], trainer)
    return tokenizer


def model_config(shape: Shape, *, vocab_size: int, end_id: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": MAX_POSITION,
        "vocab_size": vocab_size,
        "initializer_range": shape.initializer_range,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": end_id,
        "torch_dtype": "bfloat16",
    }


def random_weights(shape: Shape, *, vocab_size: int, seed: int) -> dict[str, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        values = torch.randn(*size, generator=generator, dtype=torch.float32)
        return (values * shape.initializer_range).to(torch.bfloat16)

    def ones(size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    hidden, kv_width = shape.hidden, shape.num_kv_heads * shape.head_size
    weights = {"model.embed_tokens.weight": normal(vocab_size, hidden)}
    for index in range(shape.num_layers):
        layer = f"model.layers.{index}"
        for name, width in (("q", hidden), ("k", kv_width), ("v", kv_width)):
            weights[f"{layer}.self_attn.{name}_proj.weight"] = normal(width, hidden)
            weights[f"{layer}.self_attn.{name}_proj.bias"] = normal(width)
        weights[f"{layer}.self_attn.o_proj.weight"] = normal(hidden, hidden)
        weights[f"{layer}.mlp.gate_proj.weight"] = normal(shape.intermediate, hidden)
        weights[f"{layer}.mlp.up_proj.weight"] = normal(shape.intermediate, hidden)
        weights[f"{layer}.mlp.down_proj.weight"] = normal(hidden, shape.intermediate)
        weights[f"{layer}.input_layernorm.weight"] = ones(hidden)
        weights[f"{layer}.post_attention_layernorm.weight"] = ones(hidden)
    weights["model.norm.weight"] = ones(hidden)
    weights["lm_head.weight"] = normal(vocab_size, hidden)
    return weights
