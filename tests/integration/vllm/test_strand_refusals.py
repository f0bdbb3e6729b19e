"""Engines that can't be served are refused by one sentence that names what helps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    RSWASpec,
    SinkFullAttentionSpec,
    SlidingWindowMLASpec,
    SparseCacheRole,
)

from tests.integration.vllm.strand_engine import (
    BLOCK,
    CHUNKED,
    FULL,
    HEADS,
    LARGE,
    SHAPE,
    WINDOW,
    WINDOWED,
    by_vllm,
    config,
    facts_of,
    grouped,
    name,
)
from ucm.errors import UnsupportedEngine

INDEXER = MLAAttentionSpec(
    **{**SHAPE, "num_kv_heads": 1, "head_size": 132}, cache_role=SparseCacheRole.INDEXER
)
SPECS_THAT_ARE_REFUSED = {
    "cross-attention": CrossAttentionSpec(**SHAPE),
    "reference sliding window": RSWASpec(**SHAPE, rswa_window=4),
    "static sinks": SinkFullAttentionSpec(**SHAPE, sink_len=4),
    "MLA layers with a sliding window": SlidingWindowMLASpec(**SHAPE, sliding_window=WINDOW),
    "an indexer": INDEXER,
}


def test_sinks_on_a_cpu_need_the_hybrid_manager() -> None:
    """vLLM's own answers differ from run to run without it."""
    engine = config(hybrid=False, model_type="gpt_oss")
    cache = by_vllm(engine, [WINDOWED, FULL])
    if current_platform.device_type == "cpu":
        with pytest.raises(UnsupportedEngine, match="leave out --disable-hybrid-kv-cache-manager"):
            facts_of(cache, engine)
    hybrid = config(model_type="gpt_oss")
    assert len(facts_of(by_vllm(hybrid, [WINDOWED, FULL]), hybrid).strands) == 2


def test_heads_that_can_not_be_counted_are_refused() -> None:
    """One head a rank, of layers that have fewer or larger ones than the model's others."""
    fewer = FullAttentionSpec(**{**SHAPE, "num_kv_heads": 1})
    for total, spec in ((2 * HEADS, fewer), (1, LARGE)):
        engine = config(tp_size=2, total_heads=total)
        with pytest.raises(UnsupportedEngine, match="--tensor-parallel-size than 2"):
            facts_of(by_vllm(engine, [WINDOWED] * 4 + [spec]), engine)


@pytest.mark.parametrize("words", SPECS_THAT_ARE_REFUSED)
def test_layers_that_can_not_be_stored_are_named(words: str) -> None:
    spec = SPECS_THAT_ARE_REFUSED[words]
    with pytest.raises(UnsupportedEngine) as refused:
        facts_of(grouped((spec, [0, 1, 2, 4]), (FULL, [3])))

    said = str(refused.value)
    assert said.startswith(f"this model has {words}") or words in said
    assert type(spec).__name__ in said and f"{name(2)} and 1 more" in said
    assert "run it without UCM" in said


def test_states_that_are_not_kept_or_not_told_apart_are_refused() -> None:
    kept: dict[str, Any] = {"block_size": BLOCK, "mamba_cache_mode": "align"}
    two = {**kept, "shapes": ((3, 384), (8, 32, 64)), "dtypes": (torch.float32,) * 2}

    def refused(spec: MambaSpec, **more: Any) -> str:
        with pytest.raises(UnsupportedEngine) as caught:
            facts_of(grouped((spec, [0, 1, 2]), (FULL, [3])), **{"block_tokens": BLOCK, **more})
        return str(caught.value)

    assert "set --enable-prefix-caching" in refused(
        MambaSpec(**{**two, "mamba_cache_mode": "none"})
    )
    assert "leave out --speculative-config" in refused(MambaSpec(**two, num_speculative_blocks=2))
    assert f"every {BLOCK} tokens: set block_tokens to {BLOCK}" in refused(
        MambaSpec(**two), block_tokens=2 * BLOCK
    )
    for kind in (MambaAttentionBackendEnum.LINEAR, MambaAttentionBackendEnum.GDN_ATTN):
        unknown = MambaSpec(**kept, shapes=((4, 8, 8),), dtypes=(torch.float32,), mamba_type=kind)
        assert f"state UCM doesn't know ({kind.name}, 4x8x8)" in refused(unknown)
    within = config()
    within.cache_config.prefix_match_unit = BLOCK // 2
    assert "--prefix-match-unit" in refused(MambaSpec(**two), given=within)
    assert "can't tell which are whose" in refused(
        MambaSpec(**{**two, "shapes": ((3, 385), (8, 32, 64))})
    )
    assert "no layer of this model attends to the whole prompt" in refused_alone(MambaSpec(**two))


def refused_alone(spec: MambaSpec) -> str:
    with pytest.raises(UnsupportedEngine) as caught:
        facts_of(grouped((spec, [0, 1, 2])), block_tokens=BLOCK)
    return str(caught.value)


def test_a_model_that_keeps_nothing_behind_some_boundaries_is_refused() -> None:
    """Behind a whole chunk nothing is needed, so nobody could tell what is stored."""
    with pytest.raises(UnsupportedEngine, match=r"whole prompt \(chunk 8192: 4 layers\)"):
        facts_of(by_vllm(config(), [CHUNKED] * 4))


def test_a_model_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(UnsupportedEngine, match="keeps no KV cache"):
        facts_of(grouped())


@pytest.mark.parametrize(
    ("specs", "kinds"),
    [
        ([WINDOWED, FULL], "(all: 1 layers, window 256: 1 layers)"),
        ([WINDOWED] * 2, "(window 256: 2 layers)"),
    ],
)
def test_what_only_plain_models_can_have_is_refused_by_name(
    specs: list[KVCacheSpec], kinds: str
) -> None:
    draft = SimpleNamespace(method="eagle3", draft_model_config=SimpleNamespace())
    ngram = SimpleNamespace(method="ngram", draft_model_config=SimpleNamespace())

    def refused(given: Any, **more: Any) -> str:
        with pytest.raises(UnsupportedEngine) as caught:
            facts_of(by_vllm(config(), specs), given, **more)
        return str(caught.value)

    assert f"{kinds}, and use_layerwise" in refused(config(), use_layerwise=True)
    assert f"{kinds}, and kv_layout: opaque" in refused(config(), kv_layout="opaque")
    assert "instead of --pipeline-parallel-size" in refused(config(pp_size=2))
    assert "draft model that keeps KV (eagle3)" in refused(config(speculative=draft))
    cache = by_vllm(config(), specs)
    assert facts_of(cache, config(speculative=ngram)).strands


def test_a_draft_with_kv_is_refused_in_a_pipeline_whose_stages_are_told_by_numbers_of_layers() -> (
    None
):
    cache = by_vllm(config(), [FULL] * 4)
    draft, ngram = (
        SimpleNamespace(method=method, draft_model_config=SimpleNamespace())
        for method in ("draft_model", "ngram")
    )
    with pytest.raises(UnsupportedEngine, match=r"\(draft_model\) in a pipeline.*ngram or suffix"):
        facts_of(cache, config(pp_size=2, speculative=draft))
    assert facts_of(cache, config(pp_size=2, speculative=ngram)).geometry.num_layers == 24
    assert facts_of(cache, config(speculative=draft)).geometry.num_layers == 4


def test_blocks_must_be_multiples_of_those_of_every_group() -> None:
    """48 tokens are three blocks of one group, and one and a half of the other."""
    cache = by_vllm(config(), [WINDOWED] * 5 + [LARGE])

    with pytest.raises(
        UnsupportedEngine, match="blocks of 16 and 32 tokens: set block_tokens to 64"
    ):
        facts_of(cache, block_tokens=48)
    with pytest.raises(UnsupportedEngine, match="the engine's --block-size is 16"):
        facts_of(by_vllm(config(), [WINDOWED, FULL]), block_tokens=24)


def test_a_chunk_is_a_number_of_blocks() -> None:
    """Else a block is of two chunks, and half of it is computed by nobody who goes on behind."""
    with pytest.raises(UnsupportedEngine, match="in chunks of 8192 tokens"):
        facts_of(by_vllm(config(), [CHUNKED, FULL]), block_tokens=48)


def test_kv_that_is_not_all_on_the_device_is_refused() -> None:
    cache = grouped((FULL, [0]))
    cache.kv_cache_groups.append(KVCacheGroupSpec([name(1)], FULL, host_resident=True))
    with pytest.raises(UnsupportedEngine, match="hisparse_config"):
        facts_of(cache)
