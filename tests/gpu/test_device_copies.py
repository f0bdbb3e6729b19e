"""The bytes of copies between an accelerator and slots. `ring` is where slots can't be pinned."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.caches import DUMP, HEADS, LOAD, PAGES, MakeEngine, rank_of
from tests.integration.copies.kv_layouts import (
    ALL_LAYOUTS,
    page_in,
    page_of_blocks,
    wait_for,
    whole_pages,
)
from ucm.integration.copies.jobs import PagePart
from ucm.integration.copies.layout import layer_view
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.copies.make import make_copy_engine
from ucm.integration.copies.target import CopyTarget
from ucm.store.blocks.page_layout import PageGeometry, rank_share


def blocks_of(block_tokens: int) -> list[tuple[int, ...]]:
    """Blocks of the device for each page, in no order."""
    per_page = 128 // block_tokens
    order = torch.randperm(PAGES * per_page, generator=torch.Generator().manual_seed(1)).tolist()
    return [tuple(order[i : i + per_page]) for i in range(0, len(order), per_page)]


@pytest.mark.parametrize("block_tokens", [128, 32])
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_what_is_dumped_from_one_cache_is_loaded_into_another(
    device: torch.device, make: MakeEngine, new_arena, layout: str, block_tokens: int
) -> None:
    """By way of canonical pages, bit for bit, and into the named blocks only."""
    blocks = blocks_of(block_tokens)
    num_blocks = PAGES * 128 // block_tokens + 3
    source = rank_of(layout, device, seed=2, block_tokens=block_tokens, num_blocks=num_blocks)
    target = rank_of(layout, device, block_tokens=block_tokens, num_blocks=num_blocks)
    arena = new_arena(source.geometry)
    dumping, loading = make(source), make(target)
    dumping.submit(1, DUMP, whole_pages(source, blocks), arena)
    wait_for(dumping, 1)
    for slot, block_ids in enumerate(blocks):
        expected = page_of_blocks(source.cache.read(), block_ids)
        assert torch.equal(expected, page_in(arena, source.geometry, slot))

    loading.submit(2, LOAD, whole_pages(target, blocks), arena)
    wait_for(loading, 2)
    torch.accelerator.synchronize()
    named = sorted(block for block_ids in blocks for block in block_ids)
    assert torch.equal(source.cache.read()[:, named], target.cache.read()[:, named])
    assert not bool(target.cache.read()[:, len(named) :].any())


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "BLHNC", "split_tuple"])
def test_two_ranks_dump_what_one_loads(
    device: torch.device, make: MakeEngine, new_arena, layout: str
) -> None:
    arena = new_arena(HEADS)
    sources = [rank_of(layout, device, tp=(r, 2), seed=r) for r in range(2)]
    for rank in sources:
        engine = make(rank)
        engine.submit(1, DUMP, whole_pages(rank, [(5,), (2,)]), arena)
        wait_for(engine, 1)
    target = rank_of(layout, device)
    engine = make(target)
    engine.submit(1, LOAD, whole_pages(target, [(0,), (7,)]), arena)
    wait_for(engine, 1)

    expected = torch.cat([page_of_blocks(rank.cache.read(), [5, 2]) for rank in sources], dim=1)
    assert torch.equal(expected, page_of_blocks(target.cache.read(), [0, 7]))


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
def test_a_part_of_a_page_is_written_beside_what_is_there(
    device: torch.device, make: MakeEngine, new_arena, layout: str
) -> None:
    """Two dumps of one page, its second half first."""
    rank = rank_of(layout, device, seed=3, block_tokens=32)
    arena = new_arena(HEADS)
    engine = make(rank)
    engine.submit(1, DUMP, [PagePart(0, 64, (6, 1))], arena)
    wait_for(engine, 1)
    assert bool((page_in(arena, HEADS, 0)[:, :, :64].view(torch.uint8) == 0xEE).all())
    engine.submit(2, DUMP, [PagePart(0, 0, (3, 4))], arena)
    wait_for(engine, 2)

    expected = page_of_blocks(rank.cache.read(), [3, 4, 6, 1])
    assert torch.equal(expected, page_in(arena, HEADS, 0))


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
def test_a_page_is_blank_behind_a_tail_when_its_copies_have_landed(
    device: torch.device, make: MakeEngine, new_arena, layout: str
) -> None:
    rank = rank_of(layout, device, seed=4, block_tokens=32)
    arena = new_arena(HEADS)
    engine = make(rank)
    parts = [PagePart(slot * HEADS.slot_bytes, 0, (slot, 7), 41) for slot in range(PAGES)]
    engine.submit(1, DUMP, parts, arena)
    wait_for(engine, 1)

    for slot in range(PAGES):
        page = page_in(arena, HEADS, slot)
        held = page_of_blocks(rank.cache.read(), [slot, 7])
        assert torch.equal(held[:, :, :41], page[:, :, :41])
        assert not bool(page[:, :, 41:].any())


@pytest.mark.parametrize("layouts", [("LBHNC", "latent"), ("LBNHC", "split_tuple")])
def test_a_job_copies_pages_of_several_targets(
    device: torch.device, make: MakeEngine, new_arena, layouts: tuple[str, str]
) -> None:
    """Every second layer of pages, the others, and all layers of other pages: dumped in one job,
    and loaded into all layers of one cache and all of another."""
    first, other = layouts
    groups = [rank_of(first, device, layers=range(i, 4, 2), seed=i) for i in range(2)]
    smaller = rank_of(other, device, seed=2, block_tokens=32, num_blocks=12)
    # Slots of HEADS, whose pages are the larger ones.
    arena, slot_bytes = new_arena(HEADS), HEADS.slot_bytes
    engine = make(*groups, smaller)
    pages = [
        PagePart(slot_bytes * page, 0, (2 * page + i,), 0, i) for page in (0, 1) for i in (0, 1)
    ]
    engine.submit(1, DUMP, [*pages, PagePart(2 * slot_bytes, 0, (7, 2, 9, 4), 100, 2)], arena)
    wait_for(engine, 1)

    whole = rank_of(first, device)
    back = rank_of(other, device, block_tokens=128)
    engine = make(whole, back)
    parts = [
        PagePart(0, 0, (6,)),
        PagePart(slot_bytes, 0, (5,)),
        PagePart(2 * slot_bytes, 0, (3,), 0, 1),
    ]
    engine.submit(1, LOAD, parts, arena)
    wait_for(engine, 1)
    torch.accelerator.synchronize()

    loaded = page_of_blocks(whole.cache.read(), [6, 5])
    for i, group in enumerate(groups):
        assert torch.equal(page_of_blocks(group.cache.read(), [i, 2 + i]), loaded[i::2])
    tail = page_of_blocks(back.cache.read(), [3])
    held = page_of_blocks(smaller.cache.read(), [7, 2, 9, 4])
    assert torch.equal(held[:, :, :100], tail[:, :, :100])
    assert not bool(tail[:, :, 100:].any())


def test_opaque_blocks_travel_as_bytes(device: torch.device, make: MakeEngine, new_arena) -> None:
    geometry = PageGeometry(
        num_layers=2,
        num_kv_heads=1,
        block_tokens=128,
        k_size=96 << 10,
        v_size=0,
        item_bytes=1,
        unit_tokens=64,
    )
    share = rank_share(geometry, tp_rank=0, tp_size=1, layers=range(2))
    caches = [torch.randint(0, 256, (12, 96 << 10), dtype=torch.uint8).to(device) for _ in range(2)]
    before = [cache.cpu() for cache in caches]
    views = [
        layer_view(cache, kind=LayoutKind.OPAQUE, geometry=geometry, num_heads=1, block_tokens=64)
        for cache in caches
    ]
    engine = make_copy_engine([CopyTarget(views, geometry, share)])
    arena = new_arena(geometry)
    engine.submit(1, DUMP, [PagePart(0, 0, (3, 8))], arena)
    wait_for(engine, 1)
    engine.submit(2, LOAD, [PagePart(0, 0, (10, 11))], arena)
    wait_for(engine, 2)
    engine.close()

    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(old[[3, 8]], cache[10:].cpu())
