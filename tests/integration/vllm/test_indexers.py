"""MLA with an indexer beside it (DeepSeek V3.2): the blocks of both are stored as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    MLAAttentionSpec,
    SparseCacheRole,
    create_kv_cache_views,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from tests.integration.copies.copy_engines import DUMP, ENGINES, LOAD, copy_and_wait
from tests.integration.copies.kv_layouts import make_arena
from tests.integration.vllm.strand_engine import config, facts_of
from ucm.config.settings import Settings, StoreSettings
from ucm.errors import UnsupportedEngine
from ucm.integration.copies.jobs import PagePart
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.strand_report import strands_text
from ucm.integration.vllm.identity import manifest
from ucm.integration.vllm.registered import registered_target
from ucm.integration.vllm.stats import UcmStats
from ucm.integration.vllm.worker import WorkerSide
from ucm.store.blocks.namespace import fingerprint
from ucm.store.blocks.strands import ALL

BLOCK, BLOCK_TOKENS = 64, 128
SHAPE: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 1, "max_tp_shards": 1}
# As DeepseekV32 describes its layers: latent and rotary part in bfloat16, or packed with scales.
PLAIN = MLAAttentionSpec(**SHAPE, head_size=576, dtype=torch.bfloat16)
PACKED = MLAAttentionSpec(
    **SHAPE,
    head_size=576,
    dtype=torch.uint8,
    cache_dtype_str="fp8_ds_mla",
    state_content_bytes=656,
    is_index_group_leader=True,
)
INDEXER = MLAAttentionSpec(
    **SHAPE, head_size=132, dtype=torch.uint8, cache_role=SparseCacheRole.INDEXER
)
LAYOUTS = ["LBHNC", "BLHNC"]


def grouped_by_vllm(
    mla: Sequence[MLAAttentionSpec], *, layout: str = "LBHNC", indexed: Sequence[int] | None = None
) -> KVCacheConfig:
    """In the order in which the model makes its layers: an indexer before its attention."""
    specs = {}
    for number, spec in enumerate(mla):
        layer = f"model.layers.{number}.self_attn"
        if indexed is None or number in indexed:
            specs[f"{layer}.indexer.k_cache"] = INDEXER
        specs[f"{layer}.attn"] = spec
    given = config(layout=layout)
    return get_kv_cache_config_from_groups(given, get_kv_cache_groups(given, specs), 1 << 23)


def read(cache: KVCacheConfig, *, tp_size: int = 1) -> EngineFacts:
    return facts_of(cache, config(tp_size=tp_size), block_tokens=BLOCK_TOKENS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("mla", "row_bytes"), [(PLAIN, 1152), (PACKED, 656)], ids=["bf16", "fp8"])
def test_they_are_two_strands_and_every_side_of_an_engine_reads_the_same(
    mla: MLAAttentionSpec, row_bytes: int, layout: str
) -> None:
    cache = grouped_by_vllm([mla] * 3, layout=layout)
    facts = read(cache)

    base, indexers = facts.strands
    assert (base.name, base.reach, indexers.reach) == ("", ALL, ALL)
    assert indexers.name == f"all/1x{BLOCK * 132}+0/1/{BLOCK}"
    assert base.geometry.k_size == BLOCK * row_bytes
    assert {strand.layout for strand in facts.strands} == {LayoutKind.OPAQUE}
    assert base.layer_names == tuple(f"model.layers.{n}.self_attn.attn" for n in range(3))
    assert indexers.layer_names == tuple(
        f"model.layers.{n}.self_attn.indexer.k_cache" for n in range(3)
    )
    assert facts.is_plain
    assert "Of every block of 128 tokens all is kept" in strands_text(facts.strands, 2048)
    scheduler = generate_scheduler_kv_cache_config([cache])
    assert scheduler.kv_cache_groups[0].kv_cache_spec == INDEXER
    assert read(scheduler) == facts


def test_layers_that_differ_in_something_else_than_their_blocks_are_one_strand() -> None:
    """Those that use the indexer of an earlier layer have a spec of their own."""
    follower = replace(PACKED, is_index_group_leader=False)
    facts = read(grouped_by_vllm([PACKED, follower, PACKED, follower], indexed=[0, 2]))

    assert [strand.geometry.num_layers for strand in facts.strands] == [4, 2]


def test_engines_share_a_namespace_whatever_their_ranks_and_not_with_other_blocks() -> None:
    settings = Settings(
        store=StoreSettings(socket_path="/nowhere"), block_tokens=BLOCK_TOKENS, model_id="m"
    )

    def named(mla: MLAAttentionSpec, *, tp_size: int = 1, layout: str = "LBHNC") -> str:
        given = config(tp_size=tp_size)
        facts = read(grouped_by_vllm([mla] * 2, layout=layout), tp_size=tp_size)
        return fingerprint(manifest(given, facts, settings, epoch=0))

    first = named(PACKED)
    assert named(PACKED, layout="BLHNC") == named(PACKED, tp_size=8) == first
    assert named(PLAIN) != first


def test_where_kernels_differ_their_blocks_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's: two kinds of fp8, and two orders inside a block."""
    platform = type(current_platform)
    monkeypatch.setattr(platform, "device_name", "rocm")
    monkeypatch.setattr(platform, "is_rocm", lambda self: True)
    names = set()
    for fnuz, switch in product((True, False), ("0", "1")):
        monkeypatch.setattr(platform, "is_fp8_fnuz", lambda self, fnuz=fnuz: fnuz)
        monkeypatch.setenv("VLLM_ROCM_USE_AITER", switch)
        facts = read(grouped_by_vllm([PACKED] * 2))
        (name,) = {strand.layout_name for strand in facts.strands}
        assert name.startswith("rocm-") and name.endswith(f":mla:block{BLOCK}")
        names.add(name)
    assert len(names) == 4


@pytest.mark.parametrize(
    "other",
    [
        MLAAttentionSpec(**SHAPE, head_size=64, dtype=torch.bfloat16, tokens_per_state=4),
        FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.bfloat16),
        MLAAttentionSpec(**SHAPE, head_size=64, dtype=torch.bfloat16, non_causal=True),
    ],
    ids=["compressed", "of heads", "not causal"],
)
def test_other_layers_in_their_group_are_refused(other: Any) -> None:
    cache = grouped_by_vllm([PACKED] * 2)
    group = cache.kv_cache_groups[0]
    specs = group.kv_cache_spec
    specs.kv_cache_specs["model.layers.1.self_attn.attn"] = other
    with pytest.raises(UnsupportedEngine, match="group 0 differ in the shape of their KV"):
        read(cache)


class Memory:
    """An engine's KV cache, allocated and cut into layers as vLLM's workers do it."""

    def __init__(self, layout: str, mla: MLAAttentionSpec, *, seed: int) -> None:
        self.cache = grouped_by_vllm([mla] * 3, layout=layout)
        self.facts = read(self.cache)
        specs = self.cache.kv_cache_groups[0].kv_cache_spec.kv_cache_specs
        generator = torch.Generator().manual_seed(seed)
        size = self.cache.kv_cache_tensors[0].size
        raw = torch.randint(-128, 128, (size,), dtype=torch.int8, generator=generator)
        self.layers: dict[str, Tensor] = {}
        for tensor in self.cache.kv_cache_tensors:
            views = create_kv_cache_views(
                raw, specs[tensor.layers[0]], self.cache.num_blocks, KVCacheLayout[layout], tensor
            )
            self.layers |= dict(zip(tensor.layers, views, strict=True))

    def block(self, layer: str, number: int) -> Tensor:
        return self.layers[layer][number].contiguous().view(torch.uint8).flatten()

    def copy(self, arena: Any, *, load: bool, blocks: Sequence[int], by: str = "host") -> None:
        """The page of the base, and behind it that of the indexers."""
        settings = Settings(store=StoreSettings(socket_path="/nowhere"), block_tokens=BLOCK_TOKENS)
        side = WorkerSide(settings, self.facts, tp_rank=0, stats=UcmStats())
        targets = [
            registered_target(self.facts, target, share, self.layers).target
            for target, share in zip(self.facts.targets, side._shares, strict=True)
        ]
        second = self.facts.strands[0].geometry.slot_bytes
        parts = [
            PagePart(offset, 0, tuple(blocks), target=number)
            for number, offset in enumerate((0, second))
        ]
        engine = ENGINES[by](*(SimpleNamespace(target=lambda it=it: it) for it in targets))
        try:
            copy_and_wait(engine, LOAD if load else DUMP, parts, arena)
        finally:
            engine.close()


@pytest.mark.parametrize("by", ENGINES)
@pytest.mark.parametrize("layouts", [LAYOUTS, LAYOUTS[::-1]], ids="-to-".join)
@pytest.mark.parametrize("mla", [PLAIN, PACKED], ids=["bf16", "fp8"])
def test_what_one_engine_stores_is_byte_for_byte_in_the_other(
    mla: MLAAttentionSpec, layouts: Sequence[str], by: str
) -> None:
    stored, loaded = (Memory(layout, mla, seed=seed) for seed, layout in enumerate(layouts))
    before = {name: layer.clone() for name, layer in loaded.layers.items()}
    base, indexers = (strand.geometry for strand in stored.facts.strands)
    page = replace(
        base, num_layers=1, k_size=base.slot_bytes + indexers.slot_bytes, unit_tokens=128
    )
    arena = make_arena(1, page)
    stored.copy(arena, load=False, blocks=(3, 1), by=by)
    loaded.copy(arena, load=True, blocks=(2, 4), by=by)

    for name in stored.layers:
        for source, copied in ((3, 2), (1, 4)):
            assert torch.equal(loaded.block(name, copied), stored.block(name, source)), name
        others = [n for n in range(loaded.cache.num_blocks) if n not in (2, 4)]
        assert torch.equal(
            loaded.layers[name][others].view(torch.uint8), before[name][others].view(torch.uint8)
        )
