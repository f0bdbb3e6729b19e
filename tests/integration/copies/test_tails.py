"""A tail's page is a function of its key: the KV of its tokens, and zeros behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.integration.copies.copy_engines import DUMP, ENGINES, HEADS, LATENT, MakeEngine, rank_of
from tests.integration.copies.kv_layouts import (
    LATENT_LAYOUTS,
    LAYOUTS,
    Rank,
    make_arena,
    only_share,
    page_in,
    page_of_blocks,
    wait_for,
)
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.copy_engine import CopyEngine
from ucm.integration.copies.jobs import PagePart
from ucm.integration.copies.layout import layer_view
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.copies.make import make_copy_engine
from ucm.integration.copies.target import CopyTarget
from ucm.store.blocks.page_layout import PageGeometry, rank_share

BLOCK = HEADS.block_tokens
_CUTS = [(range(1), range(1, 3)), (range(2), range(2, 3)), (range(0, 3, 2), range(1, 3, 2))]


@dataclass(frozen=True)
class Drawn:
    """An engine of some ranks, and how many tokens of its last block are a tail's."""

    layout: str
    unit: int
    tp_size: int
    stages: tuple[range, ...]
    layerwise: bool
    tail_tokens: int

    @property
    def geometry(self) -> PageGeometry:
        return LATENT if self.layout in LATENT_LAYOUTS else HEADS

    def ranks(self) -> list[Rank]:
        """Those that dump. Others hold a copy of what one of them holds."""
        ranks = [
            rank_of(
                self.layout,
                tp=(rank, self.tp_size),
                layers=layers,
                block_tokens=self.unit,
                num_blocks=12,
                seed=100 * layers.start + rank,
            )
            for layers in self.stages
            for rank in range(self.tp_size)
        ]
        return [rank for rank in ranks if rank.share.dumps]

    def parts(self) -> list[PagePart]:
        """A whole block and the tail behind it: pages 2 and 1."""
        per_block, slot_bytes = BLOCK // self.unit, self.geometry.slot_bytes
        blocks = tuple(
            (5 * i + 1) % 12 for i in range(per_block - (-self.tail_tokens // self.unit))
        )
        return [
            PagePart(2 * slot_bytes, 0, blocks[:per_block]),
            PagePart(slot_bytes, 0, blocks[per_block:], self.tail_tokens),
        ]


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    layout = draw(st.sampled_from([*LAYOUTS, *LATENT_LAYOUTS]))
    return Drawn(
        layout=layout,
        unit=draw(st.sampled_from([8, 16, 32])),
        tp_size=draw(st.sampled_from([1, 2] if layout in LATENT_LAYOUTS else [1, 2, 4, 8])),
        # Pipeline stages, or groups of every second layer.
        stages=draw(st.sampled_from([(range(3),), *_CUTS])),
        layerwise=draw(st.booleans()),
        tail_tokens=draw(st.integers(1, BLOCK - 1)),
    )


def dump(engine: CopyEngine, parts: Sequence[PagePart], arena: Arena, *, layers: int) -> None:
    """With `layers`, one by one."""
    if not layers:
        engine.submit(1, DUMP, parts, arena)
    for layer in range(layers):
        engine.submit_layer(1, DUMP, layer, parts, arena)
    wait_for(engine, 1)


def canonical(ranks: Sequence[Rank], part: PagePart) -> Tensor:
    """A page by its definition, from what the ranks hold of the part's blocks."""
    geometry = ranks[0].geometry
    page = torch.full(geometry.shape, -1, dtype=torch.int16)
    end = part.tail_tokens or geometry.block_tokens
    page[:, :, end:] = 0
    for rank in ranks:
        held = page_of_blocks(rank.cache.read(), part.block_ids)
        only_share(page, rank.share)[:, :, :end] = held[:, :, :end]
    return page


@settings(max_examples=80, deadline=None)
@given(drawn=drawn())
@pytest.mark.parametrize("engine", list(ENGINES))
def test_whatever_the_layout_the_ranks_and_the_tail_a_page_is_the_canonical_one(
    engine: str, drawn: Drawn
) -> None:
    geometry, ranks, parts = drawn.geometry, drawn.ranks(), drawn.parts()
    arena = make_arena(4, geometry)
    for rank in ranks:
        copying = ENGINES[engine](rank)
        layers = len(rank.share.layers) if drawn.layerwise else 0
        dump(copying, parts, arena, layers=layers)
        copying.close()

    for part in parts:
        page = page_in(arena, geometry, part.slot_offset // geometry.slot_bytes)
        assert torch.equal(canonical(ranks, part), page)
    for slot in (0, 3):
        assert bool((page_in(arena, geometry, slot).view(torch.uint8) == 0xEE).all())


@pytest.mark.parametrize("layerwise", [False, True])
def test_each_rank_blanks_its_own_share_and_nothing_of_the_others(
    make: MakeEngine, layerwise: bool
) -> None:
    rank = rank_of("LBHNC", tp=(1, 2), layers=range(1, 3), seed=1)
    arena = make_arena(1, HEADS)
    before = page_in(arena, HEADS, 0).clone()
    dump(make(rank), [PagePart(0, 0, (3,), 5)], arena, layers=2 if layerwise else 0)

    held = page_of_blocks(rank.cache.read(), [3])
    held[:, :, 5:] = 0
    only_share(before, rank.share)[:] = held
    assert torch.equal(before, page_in(arena, HEADS, 0))


@pytest.mark.parametrize("tail_tokens", [-1, BLOCK, BLOCK + 1])
def test_what_can_t_be_a_tail_is_not_called_good(make: MakeEngine, tail_tokens: int) -> None:
    rank, arena = rank_of("LBHNC", seed=1), make_arena(1, HEADS)
    engine = make(rank)
    engine.submit(1, DUMP, [PagePart(0, 0, (3,), tail_tokens)], arena)

    assert failed_of(engine) == [1]
    dump(engine, [PagePart(0, 0, (3,), 7)], arena, layers=0)
    assert arena.close(timeout_s=10)


def test_a_tail_in_a_page_whose_units_are_larger_than_a_token_is_not_called_good() -> None:
    """It would end inside of a unit, whose bytes are the kernel's own."""
    geometry = PageGeometry(
        num_layers=1,
        num_kv_heads=1,
        block_tokens=32,
        k_size=512,
        v_size=0,
        item_bytes=1,
        unit_tokens=16,
    )
    cache = torch.zeros((4, 512), dtype=torch.uint8)
    view = layer_view(
        cache, kind=LayoutKind.OPAQUE, geometry=geometry, num_heads=1, block_tokens=16
    )
    share = rank_share(geometry, tp_rank=0, tp_size=1, layers=range(1))
    engine = make_copy_engine([CopyTarget([view], geometry, share)])
    engine.submit(1, DUMP, [PagePart(0, 0, (3,), 16)], make_arena(1, geometry))

    assert failed_of(engine) == [1]
    engine.close()


def failed_of(engine: CopyEngine) -> list[int]:
    """Of the jobs that have ended once one has."""
    while not engine.finished():
        engine.wait_for_news(1.0)
    return engine.failed()
