"""What of an engine's own settings is in its namespace, and whether it can use a hit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from examples.cluster.models import make_model
from tests.integration.scheduler_parts import Engine, Loopback
from ucm.config.settings import Settings, StoreSettings
from ucm.errors import UnsupportedEngine
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.vllm import ucm_connector
from ucm.integration.vllm.engine_facts import adapter_rules, engine_facts, why_no_hits
from ucm.integration.vllm.identity import manifest
from ucm.store.blocks.namespace import Manifest
from ucm.store.blocks.page_layout import PageGeometry

GEOMETRY = PageGeometry(
    num_layers=1, num_kv_heads=1, block_tokens=128, k_size=8, v_size=8, item_bytes=2
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "tiny")


def config(
    model: Path | str,
    *,
    cache_dtype: str = "auto",
    speculative: Any = None,
    lora: Any = None,
    encoder_dtype: Any = None,
    **more: Any,
) -> SimpleNamespace:
    """As much of vLLM's configuration as identity reads."""
    shape = SimpleNamespace(to_dict=lambda: {"hidden_size": 8})
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model),
            revision=None,
            dtype=torch.bfloat16,
            max_model_len=4096,
            quantization=None,
            hf_config=SimpleNamespace(to_dict=dict),
            hf_text_config=shape,
            multimodal_config=SimpleNamespace(mm_encoder_attn_dtype=encoder_dtype),
            is_prefix_caching_supported=more.get("supported", True),
            pooler_config=more.get("pooler"),
        ),
        cache_config=SimpleNamespace(
            cache_dtype=cache_dtype,
            calculate_kv_scales=False,
            enable_prefix_caching=more.get("prefix_caching", True),
        ),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=more.get("chunked", True)),
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=speculative,
        lora_config=lora,
    )


def named(given: SimpleNamespace) -> Manifest:
    settings = Settings(store=StoreSettings(socket_path="/nowhere"))
    facts: Any = SimpleNamespace(geometry=GEOMETRY, layout_name="", strands=[None], is_plain=True)
    return manifest(given, facts, settings, epoch=0)


def speculation(method: str, draft: Path) -> SimpleNamespace:
    return SimpleNamespace(
        method=method, draft_model_config=SimpleNamespace(model=str(draft), revision=None)
    )


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"])
def test_speculation_that_keeps_no_kv_is_no_namespace_of_its_own(model: Path, method: str) -> None:
    """vLLM names the target as the draft model of some of them."""
    assert named(config(model, speculative=speculation(method, model))) == named(config(model))


@pytest.mark.parametrize(
    "method", ["eagle3", "draft_model", "deepseek_mtp", "extract_hidden_states", "of tomorrow"]
)
def test_speculation_whose_draft_may_keep_kv_is_one(model: Path, method: str) -> None:
    assert named(config(model, speculative=speculation(method, model))) != named(config(model))


def test_one_type_of_quantised_kv_has_one_spelling(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp8 = named(config(model, cache_dtype="fp8"))
    assert named(config(model, cache_dtype="fp8_e4m3")) == fp8
    assert named(config(model, cache_dtype="fp8_e5m2")) != fp8
    assert named(config(model)) == named(config(model, cache_dtype="bfloat16")) != fp8

    # The same name for other bytes, on MI300.
    monkeypatch.setattr(type(current_platform), "is_fp8_fnuz", classmethod(lambda cls: True))
    assert named(config(model, cache_dtype="fp8")) != fp8


def test_an_encoder_that_computes_in_a_type_of_its_own_is_another_one(model: Path) -> None:
    assert named(config(model, encoder_dtype="fp8")) != named(config(model))


def test_a_model_that_is_one_file_has_an_identity(tmp_path: Path) -> None:
    file = tmp_path / "model-q4.gguf"
    file.write_bytes(b"GGUF" + bytes(5000))

    assert named(config(file)).weights.startswith("sha256:")


def test_how_an_engine_applies_adapters_is_part_of_them(model: Path) -> None:
    def rules(**more: Any) -> str:
        lora = SimpleNamespace(**{"lora_dtype": torch.bfloat16, "target_modules": None, **more})
        return adapter_rules(config(model, lora=lora))

    assert rules() == rules(lora_dtype="auto") == adapter_rules(config(model)) == ""
    some = {
        rules(),
        rules(lora_dtype=torch.float32),
        rules(target_modules=["q_proj"]),
        rules(target_modules=["o_proj"]),
        rules(enable_moe_shared_loras=True),
    }
    assert len(some) == 5
    assert rules(target_modules=["b", "a"]) == rules(target_modules=["a", "b"])


def test_hits_are_for_engines_that_can_go_on_from_kv_they_have_not_just_computed(
    model: Path,
) -> None:
    assert why_no_hits(config(model)) == ""
    # The user's --no-enable-prefix-caching: chunks of a prompt go on from each other all the same.
    assert why_no_hits(config(model, prefix_caching=False)) == ""
    assert why_no_hits(config(model, chunked=False)) == ""
    # MLA on CPUs, and whatever else vLLM turns both off for.
    assert "both off" in why_no_hits(config(model, prefix_caching=False, chunked=False))
    # --enable-prefix-caching against vLLM's advice.
    pooler = SimpleNamespace(seq_pooling_type="MEAN")
    assert "MEAN pooling" in why_no_hits(config(model, supported=False, pooler=pooler))


def facts_of(given: SimpleNamespace, *, micro_batches: bool = False, **more: Any) -> EngineFacts:
    """As the connector learns them when vLLM makes it."""
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=32, dtype=torch.bfloat16)
    group = KVCacheGroupSpec(["layers.0"], spec)
    given.parallel_config = SimpleNamespace(
        nnodes=1,
        world_size=1,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        prefill_context_parallel_size=1,
        use_ubatching=micro_batches,
    )
    given.kv_transfer_config = SimpleNamespace(
        engine_id="e", is_kv_consumer=True, is_kv_producer=True
    )
    given.instance_id = "i"
    given.scheduler_config.max_num_batched_tokens = 64
    given.model_config.get_total_num_kv_heads = lambda: 1
    given.model_config.enable_sleep_mode = False
    settings = Settings(store=StoreSettings(socket_path="/nowhere"), **more)
    cache = KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=[group])
    return engine_facts(given, cache, settings)


def test_what_an_engine_can_not_do_is_known_when_its_connector_is_made(model: Path) -> None:
    assert facts_of(config(model)).loads
    pooler = SimpleNamespace(seq_pooling_type="MEAN")
    embedding = facts_of(config(model, supported=False, pooler=pooler))
    assert (embedding.loads, embedding.dumps) == (False, True)
    assert "MEAN pooling" in embedding.why_no_hits

    assert facts_of(config(model), micro_batches=True).loads
    with pytest.raises(UnsupportedEngine, match="--enable-dbo"):
        facts_of(config(model), micro_batches=True, use_layerwise=True)


def test_nothing_is_read_for_a_request_that_may_not_use_it() -> None:
    """One that wants logprobs of its prompt, or the state of every token. Its own is stored."""
    engine = Engine(Loopback())
    engine.prefill("a", 100)
    request = engine.add("b", 100)
    request.skip_reading_prefix_cache = True
    assert engine.side.matched_tokens(request, 0) == (0, False)
    engine.step({})
    assert engine.slots()["pins"] == 0

    longer = engine.add("c", 164)
    longer.skip_reading_prefix_cache = True
    assert engine.admit(longer) == 0
    engine.step({"c": 164})
    engine.side.finished(longer, engine.blocks(longer))
    engine.step({})
    engine.copied(*engine.take_dumping())
    engine.step({})
    assert engine.admit(engine.add("d", 164)) == 160


def test_the_connectors_name_is_known_to_vllm_once_the_module_is_imported() -> None:
    """MultiConnector rebuilds its children's statistics by name."""
    found = KVConnectorFactory.get_connector_class_by_name("UCMConnector")

    assert found is ucm_connector.UCMConnector
    ucm_connector._register()  # a second import is no error
