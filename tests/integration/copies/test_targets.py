"""One engine copies for several targets: layers that lie in pages of their own shape, or every nth
layer of the same pages, with block ids of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.integration.copies.copy_engines import (
    DUMP,
    ENGINES,
    HEADS,
    LARGER,
    LATENT,
    LOAD,
    MakeEngine,
    copy_and_wait,
    rank_of,
)
from tests.integration.copies.kv_layouts import (
    LATENT_LAYOUTS,
    LAYOUTS,
    Rank,
    make_arena,
    make_rank,
    only_share,
    page_at,
    page_in,
    page_of_blocks,
    wait_for,
)
from ucm.integration.copies.copy_engine import CopyEngine
from ucm.integration.copies.jobs import Direction, PagePart
from ucm.integration.copies.target import CopyTarget
from ucm.store.blocks.page_layout import PageGeometry

SMALL_ITEMS = PageGeometry(
    num_layers=4, num_kv_heads=2, block_tokens=32, k_size=12, v_size=12, item_bytes=1
)
# Room for a page of any of them.
SLOT_BYTES = LARGER.slot_bytes


@st.composite
def targets(draw: st.DrawFn) -> Rank:
    """A target of any shape: of all layers, or of every second or third."""
    layout = draw(st.sampled_from([*LAYOUTS, *LATENT_LAYOUTS]))
    is_latent = layout in LATENT_LAYOUTS
    geometry = LATENT if is_latent else draw(st.sampled_from([HEADS, LARGER, SMALL_ITEMS]))
    step = draw(st.integers(1, 3))
    first = draw(st.integers(0, step - 1))
    return make_rank(
        layout,
        geometry,
        tp=(0, 1) if is_latent else draw(st.sampled_from([(0, 1), (1, 2)])),
        layers=range(first, geometry.num_layers, step),
        block_tokens=draw(st.sampled_from([8, 16, 32])),
        num_blocks=draw(st.integers(4, 12)),
        seed=draw(st.integers(0, 100)),
    )


def draw_part(draw: st.DrawFn, rank: Rank, ids: list[int], slot: int, target: int) -> PagePart:
    """Of some of the blocks that are left of `ids`; of a page from its start maybe a tail."""
    in_page = rank.geometry.block_tokens // rank.block_tokens
    first = draw(st.integers(0, in_page - 1))
    count = draw(st.integers(0, min(in_page - first, len(ids))))
    blocks, ids[:] = tuple(ids[:count]), ids[count:]
    behind = draw(st.integers(0, rank.block_tokens - 1))
    tail = count * rank.block_tokens - behind
    is_tail = count and not first and tail < rank.geometry.block_tokens and draw(st.booleans())
    start = slot * SLOT_BYTES
    return PagePart(start, first * rank.block_tokens, blocks, tail if is_tail else 0, target)


def copy_one_by_one(direction: Direction, part: PagePart, memory: Tensor, rank: Rank, kv: Tensor):
    """The model: token by token between `kv`, which is what the rank's cache holds, and a page."""
    page = only_share(page_at(memory, rank.geometry, part.slot_offset), rank.share)
    for i, block in enumerate(part.block_ids):
        for token in range(rank.block_tokens):
            at = part.first_token + i * rank.block_tokens + token
            if direction is DUMP:
                page[:, :, at] = kv[:, block, :, token]
            else:
                kv[:, block, :, token] = page[:, :, at]
    if direction is DUMP and part.tail_tokens:
        page[:, :, part.tail_tokens :] = 0


@settings(max_examples=30, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_job_copies_its_parts_of_every_target_and_nothing_beside_them(
    engine: str, data: st.DataObject
) -> None:
    direction = data.draw(st.sampled_from(Direction))
    ranks = data.draw(st.lists(targets(), min_size=2, max_size=4))
    slots = iter(range(2 * len(ranks)))
    parts: list[PagePart] = []
    for target, rank in enumerate(ranks):
        ids = data.draw(st.permutations(range(rank.cache.read().shape[1])))
        parts += [draw_part(data.draw, rank, ids, next(slots), target) for _ in range(2)]
    parts = data.draw(st.permutations(parts))
    arena = make_arena(2 * len(ranks), LARGER)
    arena.bytes.random_(0, 256, generator=torch.Generator().manual_seed(4))
    memory = arena.bytes.clone()
    caches = [rank.cache.read().clone() for rank in ranks]
    for part in parts:
        copy_one_by_one(direction, part, memory, ranks[part.target], caches[part.target])

    copying = ENGINES[engine](*ranks)
    copy_and_wait(copying, direction, parts, arena)
    copying.close()

    assert torch.equal(memory, arena.bytes)
    for rank, expected in zip(ranks, caches, strict=True):
        assert torch.equal(expected, rank.cache.read())


@dataclass(frozen=True)
class Grouping:
    """How an engine cuts the layers into groups, and its heads over ranks."""

    num_groups: int
    tp_size: int
    layout: str
    block_tokens: int

    def targets_of(self, tp_rank: int, geometry: PageGeometry, seed: int | None) -> list[Rank]:
        """The groups of one rank, each with a cache of its own."""
        return [
            make_rank(
                self.layout,
                geometry,
                tp=(tp_rank, self.tp_size),
                layers=range(group, geometry.num_layers, self.num_groups),
                block_tokens=self.block_tokens,
                num_blocks=20,
                seed=None if seed is None else seed + 10 * tp_rank + group,
            )
            for group in range(self.num_groups)
        ]

    def blocks(self, group: int, page: int, geometry: PageGeometry) -> tuple[int, ...]:
        """Each group has its own blocks for a page."""
        per_page = geometry.block_tokens // self.block_tokens
        return tuple((7 * (page * per_page + i) + 3 * group) % 20 for i in range(per_page))

    def parts(self, geometry: PageGeometry) -> list[PagePart]:
        return [
            PagePart(
                page * geometry.slot_bytes, 0, self.blocks(group, page, geometry), target=group
            )
            for page in range(2)
            for group in range(self.num_groups)
        ]


groupings = st.builds(
    Grouping,
    num_groups=st.integers(1, 4),
    tp_size=st.sampled_from([1, 2, 4, 8]),
    layout=st.sampled_from(["LBHNC", "LBNHC", "BLNHC", "cpu_vec", "split_tuple"]),
    block_tokens=st.sampled_from([8, 16, 32]),
)


@settings(max_examples=5, deadline=None)
@example(Grouping(2, 2, "LBNHC", 16), Grouping(3, 1, "cpu_vec", 8))
@example(Grouping(1, 4, "split_tuple", 32), Grouping(2, 8, "LBHNC", 32))
@given(writer=groupings, reader=groupings)
@pytest.mark.parametrize("engine", list(ENGINES))
def test_pages_don_t_depend_on_how_an_engine_groups_layers_and_heads(
    engine: str, writer: Grouping, reader: Grouping
) -> None:
    """What one grouping dumps is the canonical page, and any other loads it."""
    geometry = replace(HEADS, num_layers=5)
    arena = make_arena(2, geometry)
    pages = [torch.full(geometry.shape, -1, dtype=torch.int16) for _ in range(2)]
    for tp_rank in range(writer.tp_size):
        ranks = writer.targets_of(tp_rank, geometry, seed=100)
        if ranks[0].share.dumps:
            copy_all(engine, DUMP, ranks, writer.parts(geometry), arena)
            for group, rank in enumerate(ranks):
                for slot, page in enumerate(pages):
                    held = page_of_blocks(rank.cache.read(), writer.blocks(group, slot, geometry))
                    only_share(page, rank.share)[:] = held
    for slot, page in enumerate(pages):
        assert torch.equal(page, page_in(arena, geometry, slot))

    for tp_rank in range(reader.tp_size):
        ranks = reader.targets_of(tp_rank, geometry, seed=None)
        copy_all(engine, LOAD, ranks, reader.parts(geometry), arena)
        for group, rank in enumerate(ranks):
            for slot, page in enumerate(pages):
                held = page_of_blocks(rank.cache.read(), reader.blocks(group, slot, geometry))
                assert torch.equal(only_share(page, rank.share), held)


def copy_all(engine: str, direction: Direction, ranks: list[Rank], parts, arena) -> None:
    copying = ENGINES[engine](*ranks)
    copy_and_wait(copying, direction, parts, arena)
    copying.close()


@pytest.mark.parametrize("direction", Direction)
def test_groups_that_share_their_memory_copy_their_own_blocks_of_it(
    make: MakeEngine, direction: Direction
) -> None:
    """A block is one group's at a time, and what is its first layer there is layer 0 or 1."""
    geometry = replace(HEADS, num_layers=4)
    even = make_rank("LBHNC", geometry, layers=range(0, 4, 2), seed=1)
    odd = replace(even, share=replace(even.share, layers=range(1, 4, 2)))
    arena = make_arena(1, geometry)
    arena.bytes.random_(0, 256, generator=torch.Generator().manual_seed(2))
    others = even.cache.read()[:, [0, 1, 2, 4, 6, 7]].clone()
    parts = [PagePart(0, 0, (3,)), PagePart(0, 0, (5,), target=1)]
    copy_and_wait(make(even, odd), direction, parts, arena)

    page, kv = page_in(arena, geometry, 0), even.cache.read()
    assert torch.equal(page[::2], page_of_blocks(kv, [3]))
    assert torch.equal(page[1::2], page_of_blocks(kv, [5]))
    assert torch.equal(others, kv[:, [0, 1, 2, 4, 6, 7]])


def two_targets() -> tuple[Rank, Rank]:
    """The second has four blocks of its own, of half a page each."""
    larger = make_rank("LBHNC", LARGER, block_tokens=32, num_blocks=4, seed=2)
    return rank_of("LBHNC", seed=1), larger


@pytest.mark.parametrize(
    "part",
    [
        PagePart(SLOT_BYTES, 0, (1,), target=2),
        PagePart(SLOT_BYTES, 0, (1,), target=-1),
        PagePart(SLOT_BYTES, 0, (4,), target=1),
        PagePart(SLOT_BYTES, 0, (0, 1, 2), target=1),
        PagePart(SLOT_BYTES, 0, (0, 1), 64, target=1),
    ],
    ids=["no third target", "none below 0", "block of another", "too many blocks", "no tail"],
)
def test_a_part_that_its_target_has_not_fails_the_job_and_the_next_one_works(
    make: MakeEngine, part: PagePart
) -> None:
    ranks = two_targets()
    arena = make_arena(2, LARGER)
    engine = make(*ranks)
    engine.submit(1, DUMP, [PagePart(0, 0, (7,)), part], arena)

    assert failed_of(engine) == [1]
    copy_and_wait(
        engine, DUMP, [PagePart(0, 0, (7,)), PagePart(SLOT_BYTES, 0, (3, 0), target=1)], arena
    )
    pages = page_at(arena.bytes, HEADS, 0), page_at(arena.bytes, LARGER, SLOT_BYTES)
    assert torch.equal(page_of_blocks(ranks[0].cache.read(), [7]), pages[0])
    assert torch.equal(page_of_blocks(ranks[1].cache.read(), [3, 0]), pages[1])
    assert arena.close(timeout_s=10)


@pytest.mark.parametrize("direction", Direction)
def test_only_the_first_target_is_copied_layer_by_layer(
    make: MakeEngine, direction: Direction
) -> None:
    """Its three layers are all that such a job waits for, and a part of another target fails it."""
    ranks = two_targets()
    arena = make_arena(2, LARGER)
    engine = make(*ranks)
    first, second = PagePart(0, 0, (7,)), PagePart(SLOT_BYTES, 0, (3, 0), target=1)
    for layer in range(3):
        engine.submit_layer(1, direction, layer, [first, second], arena)
    assert failed_of(engine) == [1]
    assert bool((arena.bytes == 0xEE).all())

    for layer in range(3):
        engine.submit_layer(2, direction, layer, [first], arena)
        engine.wait_layer(layer)
    wait_for(engine, 2)
    page = page_at(arena.bytes, HEADS, 0)
    assert torch.equal(page_of_blocks(ranks[0].cache.read(), [7]), page)


def test_what_can_t_be_one_target_is_refused() -> None:
    rank, smaller = rank_of("LBHNC"), rank_of("LBHNC", block_tokens=8)
    views, mixed = rank.views(), [*rank.views()[:2], *smaller.views()[2:]]
    with pytest.raises(ValueError, match="2 layer views for 3 layers"):
        CopyTarget(views[:2], HEADS, rank.share)
    with pytest.raises(ValueError, match=r"blocks of \[8, 32\] units have no ids in common"):
        CopyTarget(mixed, HEADS, rank.share)


def failed_of(engine: CopyEngine) -> Sequence[int]:
    """Of the jobs that have ended once one has."""
    while not engine.finished():
        engine.wait_for_news(1.0)
    return engine.failed()
