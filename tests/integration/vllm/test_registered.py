"""What a rank registers: told layer by layer, and refused by name."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("vllm")

import torch

from tests.integration.copies.copy_engines import DUMP, copy_and_wait, on_host
from tests.integration.copies.kv_layouts import (
    LAYOUTS,
    make_arena,
    make_rank,
    page_in,
    page_of_blocks,
)
from tests.integration.rank_parts import BLOCK_TOKENS, GEOMETRY, LAYERS, NUM_BLOCKS, facts_of
from ucm.errors import UnsupportedEngine
from ucm.integration.copies.jobs import PagePart
from ucm.integration.vllm.registered import RegisteredTarget, registered_target
from ucm.integration.vllm.strand_layout import refuse_hidden_order
from ucm.store.blocks.page_layout import rank_share

SHARE = rank_share(GEOMETRY, tp_rank=0, tp_size=1, layers=range(len(LAYERS)))


def registered(caches: dict[str, Any], *, block_tokens: int = BLOCK_TOKENS) -> RegisteredTarget:
    facts = replace(facts_of(), block_tokens=block_tokens, targets=(), strands=())
    (target,) = facts.targets
    return registered_target(facts, target, SHARE, caches)


def caches_of(*layouts: str, num_blocks: int = NUM_BLOCKS) -> tuple[dict[str, Any], torch.Tensor]:
    """Each layer in a layout of its own, and what all of them hold."""
    ranks = [
        make_rank(layout, GEOMETRY, block_tokens=BLOCK_TOKENS, num_blocks=num_blocks, seed=1)
        for layout in layouts
    ]
    caches = {
        name: rank.cache.layers[i] for i, (name, rank) in enumerate(zip(LAYERS, ranks, strict=True))
    }
    return caches, ranks[0].cache.read()


@pytest.mark.parametrize(
    "layouts",
    [
        ("split_tuple", "LBNHC", "split_in_blocks"),
        ("LBHNC", "split_tensor", "BLHNC"),
    ],
)
def test_each_layer_is_told_by_its_own_tensors(layouts: tuple[str, ...]) -> None:
    caches, logical = caches_of(*layouts)
    target = registered(caches).target
    arena = make_arena(1, GEOMETRY)
    engine = on_host(SimpleNamespace(target=lambda: target))  # type: ignore[arg-type]
    copy_and_wait(engine, DUMP, [PagePart(0, 0, (3, 9, 15, 0))], arena)
    engine.close()

    assert torch.equal(page_of_blocks(logical, (3, 9, 15, 0)), page_in(arena, GEOMETRY, 0))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "cpu_vec"])
def test_smaller_blocks_of_a_kernel_are_counted_in_every_layout(layout: str) -> None:
    caches, _ = caches_of(*[layout] * len(LAYERS), num_blocks=2 * NUM_BLOCKS)
    found = registered(caches, block_tokens=2 * BLOCK_TOKENS)
    assert (found.kernel_blocks, found.target.block_units) == (2, BLOCK_TOKENS)


def test_a_layer_that_can_t_be_told_is_refused_by_name() -> None:
    caches, _ = caches_of("LBHNC", "split_tuple", "LBHNC")
    caches[LAYERS[1]] = caches[LAYERS[1]][:1]
    told = f"the KV cache of {LAYERS[1]} is [16, 8, 4, 16] of int16, which is no layout"
    with pytest.raises(UnsupportedEngine, match=re.escape(told)):
        registered(caches)


def test_layers_whose_kernels_cut_blocks_differently_are_refused_by_name() -> None:
    caches, _ = caches_of("LBHNC", "LBHNC", "LBHNC")
    more, _ = caches_of("LBHNC", "LBHNC", "LBHNC", num_blocks=2 * NUM_BLOCKS)
    caches[LAYERS[2]] = more[LAYERS[2]]
    told = f"of {LAYERS[0]} has 1 blocks for each of vLLM's, and that of {LAYERS[2]} has 2"
    with pytest.raises(UnsupportedEngine, match=re.escape(told)):
        registered(caches)


def test_a_layer_without_a_cache_is_named() -> None:
    with pytest.raises(UnsupportedEngine, match=f"no KV cache for layer {LAYERS[2]}"):
        registered({name: torch.zeros(1) for name in LAYERS[:2]})


@pytest.mark.parametrize("cache", [None, {"k": torch.zeros(1)}, (), (torch.zeros(1), None)])
def test_what_is_no_tensor_is_refused_by_the_layer_that_has_it(cache: Any) -> None:
    caches, _ = caches_of("LBHNC", "split_tuple", "LBHNC")
    caches[LAYERS[1]] = cache
    told = f"KV cache of {LAYERS[1]} is no tensor and no tuple of tensors: {type(cache).__name__}"
    with pytest.raises(UnsupportedEngine, match=re.escape(told)):
        registered(caches)


def test_an_order_that_amd_s_kernels_keep_under_a_known_shape_is_refused() -> None:
    for is_rocm in (True, False):
        platform = SimpleNamespace(is_rocm=lambda is_rocm=is_rocm: is_rocm)
        with mock.patch("vllm.platforms.current_platform", platform):
            refuse_hidden_order("layers.0", (8, 4, 32, 32))
            refuse_hidden_order("layers.0", (8, 2, 32, 4, 16))
            if is_rocm:
                with pytest.raises(UnsupportedEngine, match="one of this kernel's own"):
                    refuse_hidden_order("layers.0", (2, 8, 32, 4, 16))
            else:
                refuse_hidden_order("layers.0", (2, 8, 32, 4, 16))


def test_a_platform_that_nobody_has_read_is_refused() -> None:
    from tests.integration.vllm.ascend_stand_in import NPU
    from tests.integration.vllm.strand_engine import FULL, config, facts_of, grouped

    other = SimpleNamespace(**{**vars(NPU), "device_type": "mlu"})
    with (
        mock.patch("vllm.platforms.current_platform", other),
        pytest.raises(UnsupportedEngine, match="kernels for mlu keep a block"),
    ):
        facts_of(grouped((FULL, range(2))), config())


def test_shuffled_blocks_of_amd_s_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.integration.vllm.ascend_stand_in import NPU
    from tests.integration.vllm.strand_engine import FULL, config, facts_of, grouped

    amd = SimpleNamespace(**{**vars(NPU), "device_type": "cuda", "is_rocm": lambda: True})
    with mock.patch("vllm.platforms.current_platform", amd):
        facts_of(grouped((FULL, range(2))), config())
        monkeypatch.setenv("VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT", "1")
        with pytest.raises(UnsupportedEngine, match="unset it"):
            facts_of(grouped((FULL, range(2))), config())
