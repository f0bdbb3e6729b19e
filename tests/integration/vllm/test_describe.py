"""What tools are told of engines that never start."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs

from examples.cluster.models import write_json
from tests.integration.vllm.strand_engine import BLOCK, FULL, WINDOWED, by_vllm, config, facts_of
from ucm.config.settings import load_settings_file, start_epoch
from ucm.integration.vllm.describe import describe
from ucm.integration.vllm.identity import manifest
from ucm.store.blocks.namespace import from_json, without_strands
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
        "window_interval: 512\n"
        "ucm_connectors:\n"
        "  - ucm_connector_name: UcmPipelineStore\n"
        "    ucm_connector_config: {storage_backends: /nowhere}\n"
    )
    question = EngineQuestion(
        model=str(folder),
        vllm_args=["--skip-tokenizer-init", *flags],
        config_file=str(settings),
        adapters=[],
    )
    return describe(question)


def test_of_models_with_windows_all_but_the_strands_is_known(tmp_path: Path) -> None:
    """Only a running engine knows these; of one without them all is known."""
    found = described(tmp_path)
    made = from_json(found.manifest_json.encode())
    assert (made.format_version, made.strands, found.page_bytes) == (2, [], 0)
    assert made == without_strands(made)
    assert made.weights == "model_id:gemma" and found.window_interval == 512
    plain = from_json(
        described(tmp_path, "--disable-hybrid-kv-cache-manager").manifest_json.encode()
    )
    assert (plain.format_version, plain.num_layers) == (1, len(WINDOWS))


def test_what_is_known_of_an_engine_with_windows_is_what_it_has_when_it_runs(
    tmp_path: Path,
) -> None:
    known = from_json(described(tmp_path).manifest_json.encode())
    given = EngineArgs(
        model=str(tmp_path), skip_tokenizer_init=True, block_size=BLOCK
    ).create_engine_config()
    given.kv_transfer_config = config().kv_transfer_config
    cache = by_vllm(config(), [FULL if each == "full_attention" else WINDOWED for each in WINDOWS])
    settings = load_settings_file(str(tmp_path / "ucm.yaml"))
    running = manifest(given, facts_of(cache), settings, epoch=start_epoch(settings))
    assert running.strands and without_strands(running) == known


def test_states_are_kept_as_far_apart_as_the_engines_flags_say(tmp_path: Path) -> None:
    """vLLM keeps these for its own cache, whatever our setting is."""
    assert described(tmp_path).state_interval_tokens == 0
    apart = described(tmp_path, "--prefix-cache-retention-interval", "512")
    assert apart.state_interval_tokens == 512
