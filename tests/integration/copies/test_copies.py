"""Copies between KV caches and slots, bit for bit, by every engine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.integration.copies.copy_engines import (
    DUMP,
    ENGINES,
    HEADS,
    LOAD,
    MakeEngine,
    StripedArena,
    copy_and_wait,
    rank_of,
)
from tests.integration.copies.kv_layouts import (
    ALL_LAYOUTS,
    make_arena,
    only_share,
    page_in,
    page_of_blocks,
    whole_pages,
)
from ucm.integration.copies import host
from ucm.integration.copies.host import HostCopyEngine
from ucm.integration.copies.jobs import Direction, PagePart


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("block_tokens", [32, 8])
def test_a_dump_writes_canonical_pages(make: MakeEngine, layout: str, block_tokens: int) -> None:
    rank = rank_of(layout, seed=1, block_tokens=block_tokens, num_blocks=16)
    blocks = (
        [(3,), (7,), (0,)] if block_tokens == 32 else [(3, 9, 15, 0), (4, 5, 6, 7), (8, 2, 1, 12)]
    )
    arena = make_arena(4, rank.geometry)
    copy_and_wait(make(rank), DUMP, whole_pages(rank, blocks), arena)

    for slot, block_ids in enumerate(blocks):
        expected = page_of_blocks(rank.cache.read(), block_ids)
        assert torch.equal(expected, page_in(arena, rank.geometry, slot))
    assert bool((arena.bytes[3 * rank.geometry.slot_bytes :] == 0xEE).all())


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("block_tokens", [32, 8])
def test_a_load_fills_the_named_blocks_and_no_other(
    make: MakeEngine, layout: str, block_tokens: int
) -> None:
    rank = rank_of(layout, block_tokens=block_tokens, num_blocks=16)
    blocks = (
        [(3,), (7,), (0,)] if block_tokens == 32 else [(3, 9, 15, 0), (4, 5, 6, 7), (8, 2, 1, 12)]
    )
    arena = make_arena(3, rank.geometry)
    arena.bytes.random_(0, 256, generator=torch.Generator().manual_seed(2))
    copy_and_wait(make(rank), LOAD, whole_pages(rank, blocks), arena)

    logical = rank.cache.read()
    for slot, block_ids in enumerate(blocks):
        expected = page_in(arena, rank.geometry, slot)
        assert torch.equal(expected, page_of_blocks(logical, block_ids))
    others = sorted(set(range(16)) - {b for ids in blocks for b in ids})
    assert not bool(logical[:, others].any())


@pytest.mark.parametrize(("dumping", "loading"), [(2, 1), (1, 2), (4, 2), (8, 1), (1, 8)])
def test_engines_of_any_tensor_parallel_size_share_pages(
    make: MakeEngine, dumping: int, loading: int
) -> None:
    """Eight ranks hold four heads: each twice, and only the first of them dumps."""
    arena = make_arena(2, HEADS)
    sources = [
        rank_of("LBHNC", tp=(r, dumping), seed=r // max(1, dumping // 4)) for r in range(dumping)
    ]
    for rank in sources:
        if rank.share.dumps:
            copy_and_wait(make(rank), DUMP, whole_pages(rank, [(5,), (6,)]), arena)
    for r in range(loading):
        rank = rank_of("cpu_vec", tp=(r, loading))
        copy_and_wait(make(rank), LOAD, whole_pages(rank, [(1,), (0,)]), arena)
        loaded = page_of_blocks(rank.cache.read(), [1, 0])

        for source in sources:
            heads = sorted(set(source.share.heads) & set(rank.share.heads))
            theirs = page_of_blocks(source.cache.read(), [5, 6])
            for head in heads:
                assert torch.equal(
                    theirs[:, head - source.share.heads.start],
                    loaded[:, head - rank.share.heads.start],
                )


def test_pipeline_stages_hold_layers_of_one_page(make: MakeEngine) -> None:
    arena = make_arena(1, HEADS)
    for stage in (range(2), range(2, 3)):
        rank = rank_of("LBNHC", layers=stage, seed=stage.start)
        copy_and_wait(make(rank), DUMP, whole_pages(rank, [(4,)]), arena)

        expected = page_of_blocks(rank.cache.read(), [4])
        assert torch.equal(expected, only_share(page_in(arena, HEADS, 0), rank.share))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("layout", ["LBHNC", "BLNHC", "cpu_vec", "split_tuple"])
def test_any_parts_of_pages_are_copied_and_nothing_beside_them(
    engine: str, layout: str, data: st.DataObject
) -> None:
    """Parts start and end at any block; the model is a copy of pages and blocks token by token."""
    direction = data.draw(st.sampled_from(Direction))
    rank = rank_of(layout, seed=3, block_tokens=8, num_blocks=12, tp=(1, 2))
    arena = make_arena(3, HEADS)
    arena.bytes.random_(0, 256, generator=torch.Generator().manual_seed(4))
    ids = iter(data.draw(st.permutations(range(12))))
    parts: list[PagePart] = []
    pages = [page_in(arena, HEADS, slot).clone() for slot in range(3)]
    logical = rank.cache.read().clone()
    for slot in data.draw(st.permutations(range(3))):
        first = data.draw(st.integers(0, 3))
        count = data.draw(st.integers(0, 4 - first))
        blocks = tuple(next(ids) for _ in range(count))
        parts.append(PagePart(slot * HEADS.slot_bytes, first * 8, blocks))
        mine = only_share(pages[slot], rank.share)
        for i, block in enumerate(blocks):
            tokens = slice((first + i) * 8, (first + i + 1) * 8)
            if direction is DUMP:
                mine[:, :, tokens] = logical[:, block]
            else:
                logical[:, block] = mine[:, :, tokens]
    copying = ENGINES[engine](rank)
    copy_and_wait(copying, direction, parts, arena)
    copying.close()

    assert torch.equal(logical, rank.cache.read())
    for slot in range(3):
        assert torch.equal(pages[slot], page_in(arena, HEADS, slot))


def test_a_job_without_pages_ends(make: MakeEngine) -> None:
    copy_and_wait(make(rank_of("LBHNC")), LOAD, [], make_arena(1, HEADS))


@pytest.mark.parametrize(
    "part",
    [
        PagePart(0, 0, (8,)),
        PagePart(0, 0, (-1,)),
        PagePart(0, 0, (1, 2)),
        PagePart(0, 8, (1,)),
        PagePart(1 << 40, 0, (1,)),
    ],
)
def test_a_job_that_can_t_be_copied_is_named_as_failed_and_the_next_one_works(
    make: MakeEngine, part: PagePart
) -> None:
    rank = rank_of("LBHNC", seed=9)
    arena = make_arena(1, HEADS)
    engine = make(rank)
    engine.submit(5, DUMP, [part], arena)
    engine.fence([5])
    named: list[int] = []
    while not named:
        named = engine.finished()

    assert [5] == named
    assert [5] == engine.failed()
    copy_and_wait(engine, DUMP, whole_pages(rank, [(2,)]), arena)
    assert torch.equal(page_of_blocks(rank.cache.read(), [2]), page_in(arena, HEADS, 0))
    assert arena.close(timeout_s=10)


def test_a_cache_registered_in_inference_mode_can_be_loaded(make: MakeEngine) -> None:
    with torch.inference_mode():
        rank = rank_of("cpu_vec")
        engine = make(rank)
    arena = make_arena(1, HEADS)
    arena.bytes.fill_(0x5A)
    copy_and_wait(engine, LOAD, whole_pages(rank, [(3,)]), arena)

    assert bool((rank.cache.read()[:, 3] == 0x5A5A).all())


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("engine", ["direct", "staged", "tiny staging"])
def test_memory_that_is_pinned_in_part_is_copied_whole(engine: str, direction: Direction) -> None:
    """One transfer never crosses from pinned to other memory; the rest goes by the ring."""
    rank = rank_of("LBHNC", seed=11)
    plain = make_arena(2, HEADS)
    plain.bytes.random_(0, 256, generator=torch.Generator().manual_seed(12))
    arena = StripedArena(plain.bytes.numpy().data)  # type: ignore[arg-type]
    copying = ENGINES[engine](rank)
    copy_and_wait(copying, direction, whole_pages(rank, [(2,), (3,)]), arena)
    copying.close()

    for slot, block in enumerate((2, 3)):
        expected = page_of_blocks(rank.cache.read(), [block])
        assert torch.equal(expected, page_in(arena, HEADS, slot))


def test_blocks_are_gathered_straight_into_the_staging_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without memory for what lies between: on a device it would be as much again."""
    outs: list[int] = []
    gather = torch.ops.aten.index.Tensor_out

    def note(*args, out):
        outs.append(out.data_ptr())
        result = gather(*args, out=out)
        assert result.data_ptr() == out.data_ptr()
        return result

    monkeypatch.setattr(torch.ops.aten.index, "Tensor_out", note)
    rank = rank_of("LBNHC", seed=2)
    engine = ENGINES["staged"](rank)
    copy_and_wait(engine, DUMP, whole_pages(rank, [(2,), (3,)]), make_arena(2, HEADS))
    engine.close()
    assert len(outs) == 1
    assert not [r for r in caplog.records if "need more memory" in r.getMessage()]


def test_more_threads_than_pages_are_fine() -> None:
    rank = rank_of("cpu_vec", seed=14)
    arena = make_arena(2, HEADS)
    engine = HostCopyEngine([rank.target()], num_threads=7)
    copy_and_wait(engine, DUMP, whole_pages(rank, [(0,), (1,)]), arena)
    engine.close()

    assert torch.equal(page_of_blocks(rank.cache.read(), [1]), page_in(arena, HEADS, 1))


@pytest.mark.parametrize("beside_bytes", [1, 3 * 32 * 16 * 2, 1 << 30])
def test_a_transposed_load_is_the_same_in_pieces_of_any_size(
    beside_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One head; a few heads, so that layers don't divide evenly; all layers at once."""
    monkeypatch.setattr(host, "_BESIDE_BYTES", beside_bytes)
    rank = rank_of("cpu_vec")
    arena = make_arena(2, HEADS)
    arena.bytes.random_(0, 256, generator=torch.Generator().manual_seed(15))
    engine = HostCopyEngine([rank.target()], num_threads=1)
    copy_and_wait(engine, LOAD, whole_pages(rank, [(2,), (0,)]), arena)
    engine.close()

    for slot, block in enumerate([2, 0]):
        assert torch.equal(page_of_blocks(rank.cache.read(), [block]), page_in(arena, HEADS, slot))


def test_a_job_that_can_t_be_submitted_ends_as_failed_and_frees_its_arena(
    make: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is that is raised: an arena that has been closed, a device that fails."""
    rank = rank_of("LBHNC", seed=9)
    engine = make(rank)
    closed, arena = make_arena(1, HEADS), make_arena(1, HEADS)
    closed.close()
    engine.submit(1, LOAD, whole_pages(rank, [(0,)]), closed)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_enqueue", raise_error)
        engine.submit(2, DUMP, whole_pages(rank, [(2,)]), arena)
        for layer in range(3):
            engine.submit_layer(3, LOAD, layer, whole_pages(rank, [(2,)]), arena)

    assert [1, 2, 3] == engine.finished()
    assert [1, 2, 3] == engine.failed()
    engine.fence([1, 2, 3])
    copy_and_wait(engine, DUMP, whole_pages(rank, [(2,)]), arena)
    assert arena.close(timeout_s=0)


def raise_error(*args: object) -> None:
    raise RuntimeError("the device fails")
