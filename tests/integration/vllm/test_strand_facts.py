"""Strands and targets, read from what vLLM makes of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from tests.integration.vllm.strand_engine import (
    BLOCK,
    CHUNKED,
    FULL,
    LARGE,
    SHAPE,
    WINDOW,
    WINDOWED,
    by_vllm,
    config,
    facts_of,
    grouped,
)
from ucm.config.settings import Settings, StoreSettings
from ucm.errors import UnsupportedEngine
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.strand_report import strands_text
from ucm.integration.vllm.identity import manifest
from ucm.store.blocks.namespace import differences, fingerprint
from ucm.store.blocks.strands import ALL, Reach, ReachKind


@dataclass
class Arch:
    """As vLLM knows a model's layers one by one."""

    total_num_kv_heads: int
    head_size: int
    per_layer_overrides: list[dict[str, int]]

    def __getitem__(self, layer: int) -> Any:
        return SimpleNamespace(**self.per_layer_overrides[layer])


def numbers(names: Sequence[str]) -> list[int]:
    return [int(each.split(".")[2]) for each in names]


def check_targets(facts: EngineFacts, cache: KVCacheConfig) -> None:
    """Every layer lies at one place of one strand's page, and is copied by one target."""
    copied: list[str] = []
    for target in facts.targets:
        strand = facts.strands[target.strand]
        group = cache.kv_cache_groups[target.group]
        assert len(target.positions) == len(target.layer_names)
        assert target.layer_names == tuple(strand.layer_names[i] for i in target.positions)
        assert set(target.layer_names) <= set(group.layer_names)
        copied += target.layer_names
    assert sorted(copied) == sorted(n for each in cache.kv_cache_groups for n in each.layer_names)
    assert sum(strand.geometry.num_layers for strand in facts.strands) == len(copied)
    for strand in facts.strands:
        assert numbers(strand.layer_names) == sorted(numbers(strand.layer_names))


def test_a_plain_model_is_one_strand_and_one_target() -> None:
    facts = facts_of(by_vllm(config(), [FULL] * 4))

    (strand,), (target,) = facts.strands, facts.targets
    assert (strand.name, strand.reach, target.positions) == ("", ALL, range(4))
    assert strand.geometry == facts.geometry and strand.layer_names == facts.layer_names
    assert (target.group, target.block_tokens) == (0, BLOCK) == (0, facts.block_tokens)
    assert facts.layout is LayoutKind.CPU_VEC or current_platform.device_type != "cpu"
    assert replace(facts, strands=(), targets=()) == facts


def test_a_model_whose_layers_all_have_windows_begins_with_the_longest() -> None:
    longer = SlidingWindowSpec(**SHAPE, sliding_window=2 * WINDOW)
    (strand,) = facts_of(by_vllm(config(), [WINDOWED] * 4)).strands
    assert (strand.name, strand.reach) == ("", Reach(ReachKind.WINDOW, WINDOW))

    cache = by_vllm(config(), [CHUNKED, WINDOWED, longer, WINDOWED])
    facts = facts_of(cache)
    first, *others = facts.strands
    assert (first.name, first.reach) == ("", Reach(ReachKind.WINDOW, 2 * WINDOW))
    assert sorted(each.name for each in others) == ["chunk-8192/4x64+64/2", "window-256/4x64+64/2"]
    assert not facts.has_base and not facts.is_plain
    check_targets(facts, cache)


def test_windows_and_full_attention_are_two_strands_in_as_many_groups_as_vllm_likes() -> None:
    """Gemma 3: five windows, one full layer, and so on; 26 layers, the last group is short."""
    specs = [FULL if n % 6 == 5 else WINDOWED for n in range(26)]
    cache = by_vllm(config(), specs)
    facts = facts_of(cache)

    base, window = facts.strands
    assert numbers(base.layer_names) == [5, 11, 17, 23] == numbers(facts.layer_names)
    assert base.geometry == facts.geometry and facts.geometry.num_layers == 4
    assert window.reach == Reach(ReachKind.WINDOW, WINDOW) and window.geometry.num_layers == 22
    assert (base.name, window.name) == ("", "window-256/4x64+64/2")
    assert len(cache.kv_cache_groups) == len(facts.targets) == 7
    assert facts.targets[0].strand == 0
    check_targets(facts, cache)


@given(st.lists(st.sampled_from([FULL, WINDOWED, CHUNKED]), min_size=1, max_size=20), st.booleans())
def test_whatever_the_groups_every_layer_is_in_its_place(
    specs: list[KVCacheSpec], packed: bool
) -> None:
    engine = config(layout="BLHNC" if packed else "LBHNC")
    cache = by_vllm(engine, [*specs, FULL])
    facts = facts_of(cache)
    check_targets(facts, cache)

    reaches = [ALL if spec == FULL else None for spec in specs]
    assert len(facts.strands) == len({id(spec) for spec in [*specs, FULL]})
    assert len(facts.strands[0].layer_names) == reaches.count(ALL) + 1


@given(st.lists(st.integers(0, 2), min_size=2, max_size=12))
def test_layers_that_are_dealt_out_unevenly_are_several_targets(groups: list[int]) -> None:
    """A target's layers are a step apart in the page."""
    used = sorted(set(groups))
    cache = grouped(
        (FULL, [len(groups)]),
        *((WINDOWED, [n for n, group in enumerate(groups) if group == each]) for each in used),
    )
    facts = facts_of(cache)

    check_targets(facts, cache)
    of_windows = [target for target in facts.targets if target.strand == 1]
    assert len(of_windows) <= len(groups)
    assert {target.group for target in of_windows} == set(range(1, len(used) + 1))


def test_layers_dealt_out_in_turn_are_one_target_each() -> None:
    facts = facts_of(grouped((WINDOWED, [0, 2, 4]), (WINDOWED, [1, 3, 5]), (FULL, [6])))

    assert [(each.strand, each.group, each.positions) for each in facts.targets] == [
        (0, 2, range(1)),
        (1, 0, range(0, 6, 2)),
        (1, 1, range(1, 6, 2)),
    ]


def test_layers_of_one_number_lie_in_the_order_of_their_names() -> None:
    """And not in that of groups, which engines form as they like."""
    cache = grouped((WINDOWED, [0]), (WINDOWED, [1]), (FULL, [2]))
    first, second = cache.kv_cache_groups[0].layer_names, cache.kv_cache_groups[1].layer_names
    for one, other in (("a", "b"), ("b", "a")):
        first[:], second[:] = [f"layers.0.{one}.attn"], [f"layers.0.{other}.attn"]

        assert facts_of(cache).strands[1].layer_names == ("layers.0.a.attn", "layers.0.b.attn")


def test_layers_of_unlike_heads_are_strands_of_their_own_whose_blocks_differ() -> None:
    """Gemma 4's global layers have fewer and larger heads, so vLLM gives them other blocks."""
    cache = by_vllm(config(), [WINDOWED] * 5 + [LARGE])
    facts = facts_of(cache)

    check_targets(facts, cache)
    assert (facts.geometry.num_kv_heads, facts.geometry.k_size) == (1, 512)
    assert {facts.strands[each.strand].reach: each.block_tokens for each in facts.targets} == {
        ALL: 16,
        Reach(ReachKind.WINDOW, WINDOW): 32,
    }


def test_layers_of_unlike_heads_that_vllm_takes_for_one_type_are_refused_on_both_sides() -> None:
    """All attend to the whole prompt; half of them with other heads. vLLM's scheduler hears of one
    shape only."""
    wide = FullAttentionSpec(**{**SHAPE, "head_size": 128})
    cache = by_vllm(config(), [wide, FULL, wide, FULL])

    assert isinstance(cache.kv_cache_groups[0].kv_cache_spec, UniformTypeKVCacheSpecs)
    for each in (cache, generate_scheduler_kv_cache_config([cache])):
        with pytest.raises(UnsupportedEngine, match="group 0 differ in the shape"):
            facts_of(each)


@pytest.mark.parametrize("full", [FULL, LARGE], ids=["alike", "of unlike shapes"])
@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
def test_the_scheduler_and_its_workers_read_the_same(layout: str, full: KVCacheSpec) -> None:
    """Where blocks hold all layers, vLLM packs those of unlike shapes into groups of one type."""
    cache = by_vllm(config(layout=layout), [full if n % 6 == 5 else WINDOWED for n in range(26)])
    facts = facts_of(cache)

    assert facts_of(generate_scheduler_kv_cache_config([cache])) == facts
    check_targets(facts, cache)
    assert [numbers(each.layer_names) for each in facts.strands[:1]] == [[5, 11, 17, 23]]


def test_with_the_hybrid_manager_off_a_model_is_plain() -> None:
    engine = config(hybrid=False)
    facts = facts_of(by_vllm(engine, [WINDOWED, FULL] * 2), engine)

    assert len(facts.strands) == len(facts.targets) == 1
    assert facts.strands[0].reach == ALL and facts.geometry.num_layers == 4


def test_each_strand_is_packed_as_its_own_kernel_does() -> None:
    if current_platform.device_type != "cpu":
        pytest.skip("of the CPU's kernels")
    facts = facts_of(by_vllm(config(), [WINDOWED, FULL]), isa="amx")

    assert {strand.layout for strand in facts.strands} == {LayoutKind.OPAQUE}
    assert {strand.geometry.k_size for strand in facts.strands} == {FULL.page_size_bytes}
    assert [strand.layout_name for strand in facts.strands] == ["cpu:amx:block16:tp1"] * 2
    assert facts.strands[1].name == "window-256/1x16384+0/1/16"


@pytest.mark.parametrize(
    ("tp_size", "total", "per_rank", "expected"),
    [(1, 4, 4, 4), (2, 8, 4, 8), (4, 4, 1, 4), (8, 4, 1, 4)],
)
def test_the_heads_of_a_strand_are_those_of_all_ranks(
    tp_size: int, total: int, per_rank: int, expected: int
) -> None:
    """With more ranks than heads some have the same."""
    shape = {**SHAPE, "num_kv_heads": per_rank}
    engine = config(tp_size=tp_size, total_heads=total)
    specs = [SlidingWindowSpec(**shape, sliding_window=WINDOW), FullAttentionSpec(**shape)]

    facts = facts_of(by_vllm(engine, specs), engine)
    assert [strand.geometry.num_kv_heads for strand in facts.strands] == [expected] * 2


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
@pytest.mark.parametrize(
    ("local", "full", "window", "period", "num_layers"),
    [
        ((1, 256), (1, 512), 512, 5, 15),
        ((2, 256), (2, 512), 512, 6, 24),
        ((8, 256), (2, 512), 1024, 6, 30),
        ((16, 256), (4, 512), 1024, 6, 60),
    ],
    ids=["E2B", "E4B", "26B-A4B", "31B"],
)
def test_gemma_4_is_served_whatever_its_size_its_ranks_and_its_layout(
    local: tuple[int, int],
    full: tuple[int, int],
    window: int,
    period: int,
    num_layers: int,
    layout: str,
    tp_size: int,
) -> None:
    """Of E2B and E4B, the layers that have KV of their own."""
    shapes = [full if n % period == period - 1 else local for n in range(num_layers)]
    fields = [{"total_num_kv_heads": heads, "head_size": size} for heads, size in shapes]
    arch = Arch(**{**fields[0], "per_layer_overrides": fields})
    engine = config(tp_size=tp_size, layout=layout, arch=arch, total_heads=local[0])
    shape = {"block_size": BLOCK, "dtype": torch.bfloat16}
    specs: list[KVCacheSpec] = [
        FullAttentionSpec(**shape, num_kv_heads=max(1, heads // tp_size), head_size=size)
        if (heads, size) == full
        else SlidingWindowSpec(
            **shape,
            num_kv_heads=max(1, heads // tp_size),
            head_size=size,
            sliding_window=window,
        )
        for heads, size in shapes
    ]
    cache = by_vllm(engine, specs)
    facts = facts_of(cache, engine)

    assert facts_of(generate_scheduler_kv_cache_config([cache]), engine) == facts
    check_targets(facts, cache)
    geometries = [strand.geometry for strand in facts.strands]
    assert [(each.num_kv_heads, each.k_size) for each in geometries] == [full, local]
    assert [strand.reach for strand in facts.strands] == [ALL, Reach(ReachKind.WINDOW, window)]


def test_engines_whose_strands_differ_are_in_namespaces_of_their_own() -> None:
    """The same layers, dealt out otherwise or with other windows."""
    settings = Settings(store=StoreSettings(socket_path="/nowhere"), model_id="gemma")

    def named(given: Any, cache: KVCacheConfig) -> Any:
        return manifest(given, facts_of(cache, given), settings, epoch=0)

    other = SlidingWindowSpec(**SHAPE, sliding_window=WINDOW + 1)
    hybrid, plain = config(), config(hybrid=False)
    found = [
        named(hybrid, by_vllm(hybrid, [WINDOWED, FULL, WINDOWED, FULL])),
        named(hybrid, by_vllm(hybrid, [WINDOWED, WINDOWED, FULL, FULL])),
        named(hybrid, by_vllm(hybrid, [other, FULL, other, FULL])),
        named(plain, by_vllm(plain, [WINDOWED, FULL, WINDOWED, FULL])),
        named(hybrid, by_vllm(hybrid, [WINDOWED] * 4)),
    ]
    assert len({fingerprint(each) for each in found}) == len(found)
    assert [each.format_version for each in found] == [2, 2, 2, 1, 2]
    assert named(hybrid, by_vllm(hybrid, [FULL] * 4)) == found[3]
    assert differences(found[0], found[1]) == [
        "strands.0.layers: [1,3] (there) / [2,3] (here)",
        "strands.1.layers: [0,2] (there) / [0,1] (here)",
    ]
    # Groups are the engine's own matter.
    groups = grouped((WINDOWED, [2]), (WINDOWED, [0]), (FULL, [1, 3]))
    assert named(hybrid, groups) == found[0]


def test_one_line_says_what_a_model_stores() -> None:
    facts = facts_of(by_vllm(config(), [FULL if n % 6 == 5 else WINDOWED for n in range(24)]))

    # Two of 16 blocks: at a boundary, and at the token before, a window of 256 begins with a block.
    assert strands_text(facts.strands, 2048) == (
        "this model has 2 strands: all, 4 layers, 4 KiB per token, 512 KiB per block; "
        "window 256, 20 layers, 20 KiB per token, 2.5 MiB per block. Hits end every 2048 tokens "
        "(window_interval) and at the end of a prompt: a prompt of 32768 writes 6.348 MiB per 1000 "
        "tokens, 27 % of its KV"
    )
    assert "every 128 tokens" in strands_text(facts.strands, 64), "rounded up to blocks"
    ends_only = "Hits end at the end of a prompt (more often with window_interval): a prompt of"
    assert ends_only in strands_text(facts.strands, 0)
