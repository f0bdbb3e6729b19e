"""What tools are told of engines that never start."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from examples.cluster.models import write_json
from ucm.errors import UnsupportedEngine
from ucm.integration.vllm.describe import describe
from ucm.store.blocks.namespace import from_json
from ucm.store.inspect.engine_identity import EngineIdentity, EngineQuestion

WINDOWS = ["sliding_attention"] * 5 + ["full_attention"]


def described(folder: Path, *flags: str) -> EngineIdentity:
    """Gemma 3, with windows in five of six layers."""
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": len(WINDOWS),
        "layer_types": WINDOWS,
        "sliding_window": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 320,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)
    settings = folder / "ucm.yaml"
    settings.write_text(
        "model_id: gemma\n"
        "ucm_connectors:\n"
        "  - ucm_connector_name: UcmPipelineStore\n"
        "    ucm_connector_config: {storage_backends: /nowhere}\n"
    )
    question = EngineQuestion(
        model=str(folder),
        vllm_args=["--skip-tokenizer-init", *flags],
        config_file=str(settings),
        prompt_file="",
        adapters=[],
    )
    return describe(question)


def test_models_with_windows_are_not_told_for_plain_ones(tmp_path: Path) -> None:
    """Only a running engine knows their strands; of one without them all is known."""
    with pytest.raises(UnsupportedEngine, match="--disable-hybrid-kv-cache-manager"):
        described(tmp_path)
    plain = from_json(
        described(tmp_path, "--disable-hybrid-kv-cache-manager").manifest_json.encode()
    )
    assert (plain.format_version, plain.num_layers) == (1, len(WINDOWS))
