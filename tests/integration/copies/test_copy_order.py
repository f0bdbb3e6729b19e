"""What a copy waits for, and who waits for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.integration.copies.copy_engines import (
    BIG,
    DUMP,
    HEADS,
    LOAD,
    MainMemory,
    MakeEngine,
    copy_and_wait,
    on_device,
    rank_of,
)
from tests.integration.copies.kv_layouts import (
    Rank,
    make_arena,
    make_rank,
    page_in,
    page_of_blocks,
    wait_for,
    whole_pages,
)
from ucm.integration.copies.copy_engine import CopyEngine
from ucm.integration.copies.host import HostCopyEngine
from ucm.integration.copies.jobs import Direction, PagePart


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC", "cpu_vec", "split_tensor"])
def test_layer_by_layer_is_the_same_page(make: MakeEngine, layout: str) -> None:
    rank = rank_of(layout, seed=5)
    arena = make_arena(2, HEADS)
    engine = make(rank)
    parts = whole_pages(rank, [(2,), (6,)])
    for layer in (0, 2, 1):
        engine.order_after_forward()
        assert engine.finished() == []
        engine.submit_layer(9, DUMP, layer, parts, arena)
    wait_for(engine, 9)

    for slot, block in enumerate((2, 6)):
        expected = page_of_blocks(rank.cache.read(), [block])
        assert torch.equal(expected, page_in(arena, HEADS, slot))


def test_a_layer_that_was_waited_for_is_there(make: MakeEngine) -> None:
    rank = rank_of("LBNHC")
    arena = make_arena(2, HEADS)
    arena.bytes.random_(0, 256, generator=torch.Generator().manual_seed(6))
    engine = make(rank)
    for layer in range(3):
        for job, slot in ((1, 0), (2, 1)):
            parts = [PagePart(slot * HEADS.slot_bytes, 0, (slot,))]
            engine.submit_layer(job, LOAD, layer, parts, arena)
    for layer in range(3):
        engine.wait_layer(layer)
        loaded = page_of_blocks(rank.cache.read(), [0])[layer]
        assert torch.equal(page_in(arena, HEADS, 0)[layer], loaded)
        loaded = page_of_blocks(rank.cache.read(), [1])[layer]
        assert torch.equal(page_in(arena, HEADS, 1)[layer], loaded)
    wait_for(engine, 1, 2)


def test_a_layer_without_loads_is_not_waited_for(make: MakeEngine) -> None:
    make(rank_of("LBHNC")).wait_layer(1)


def test_blocks_may_be_overwritten_after_a_fence(make: MakeEngine) -> None:
    rank = rank_of("LBHNC", seed=7, num_blocks=64)
    before = rank.cache.read()
    arena = make_arena(64, HEADS)
    engine = make(rank)
    for job in range(8):
        parts = [
            PagePart(block * HEADS.slot_bytes, 0, (block,)) for block in range(job * 8, job * 8 + 8)
        ]
        engine.submit(job, DUMP, parts, arena)
    engine.fence(range(8))
    for kv in rank.cache.layers:
        assert isinstance(kv, torch.Tensor)
        kv.fill_(-1)
    wait_for(engine, *range(8))

    for block in range(64):
        assert torch.equal(page_of_blocks(before, [block]), page_in(arena, HEADS, block))


def test_a_fence_knows_jobs_that_ended_and_jobs_that_never_were(make: MakeEngine) -> None:
    rank = rank_of("LBHNC", seed=8)
    engine = make(rank)
    copy_and_wait(engine, DUMP, whole_pages(rank, [(1,)]), make_arena(1, HEADS))
    engine.fence([1, 77])


def test_closing_lets_submitted_copies_end(make: MakeEngine) -> None:
    rank = rank_of("LBHNC", seed=10)
    arena = make_arena(8, HEADS)
    engine = make(rank)
    for job in range(8):
        engine.submit(job, DUMP, [PagePart(job * HEADS.slot_bytes, 0, (job,))], arena)
    engine.close()
    engine.close()

    assert list(range(8)) == sorted(engine.finished())
    assert arena.close(timeout_s=0)
    for slot in range(8):
        expected = page_of_blocks(rank.cache.read(), [slot])
        assert torch.equal(expected, page_in(arena, HEADS, slot))


def test_a_large_layer_is_there_when_it_was_waited_for() -> None:
    """So large that it can't be there by chance."""
    rank = make_rank("cpu_vec", BIG, num_blocks=4)
    arena = make_arena(2, BIG)
    arena.bytes.random_(0, 256, generator=torch.Generator().manual_seed(16))
    engine = HostCopyEngine([rank.target()], num_threads=1)
    parts = whole_pages(rank, [(3,), (1,)])
    for layer in range(BIG.num_layers):
        engine.submit_layer(1, LOAD, layer, parts, arena)
        engine.wait_layer(layer)
        loaded = page_of_blocks(rank.cache.read()[layer : layer + 1], [3])
        assert torch.equal(page_in(arena, BIG, 0)[layer], loaded[0])
    wait_for(engine, 1)
    engine.close()


class TestOrder:
    """What waits for the forward pass, and what does not."""

    @pytest.fixture
    def device(self) -> MainMemory:
        return MainMemory()

    @pytest.fixture
    def rank(self) -> Rank:
        return rank_of("LBHNC", seed=13)

    @pytest.fixture
    def engine(self, device: MainMemory, rank: Rank) -> Iterator[CopyEngine]:
        make = on_device(staging_bytes=1 << 20, direct_run_bytes=1, accelerator=device)
        engine = make(rank)
        yield engine
        device.catch_up()
        engine.close()

    @pytest.mark.parametrize("direction", Direction)
    def test_copies_wait_for_the_kernels_before_them_and_nobody_waits_for_the_copies(
        self, device: MainMemory, engine: CopyEngine, rank: Rank, direction: Direction
    ) -> None:
        arena = make_arena(1, HEADS)
        device.busy = True
        engine.submit(1, direction, whole_pages(rank, [(4,)]), arena)
        assert engine.finished() == []
        assert bool((arena.bytes == 0xEE).all())
        device.catch_up()
        wait_for(engine, 1)

        expected = page_of_blocks(rank.cache.read(), [4])
        assert torch.equal(expected, page_in(arena, HEADS, 0))

    def test_a_dump_waits_only_for_the_forward_pass_that_computed_it(
        self, device: MainMemory, engine: CopyEngine, rank: Rank
    ) -> None:
        engine.order_after_forward()
        device.busy = True
        engine.submit(1, DUMP, whole_pages(rank, [(4,)]), make_arena(1, HEADS))
        wait_for(engine, 1)

    def test_a_load_waits_only_for_what_ran_before_the_step(
        self, device: MainMemory, engine: CopyEngine, rank: Rank
    ) -> None:
        engine.order_before_forward()
        device.busy = True
        engine.submit(1, LOAD, whole_pages(rank, [(4,)]), make_arena(1, HEADS))
        wait_for(engine, 1)

    def test_a_dump_that_waits_holds_up_no_load(
        self, device: MainMemory, engine: CopyEngine, rank: Rank
    ) -> None:
        engine.order_before_forward()
        arena = make_arena(2, HEADS)
        device.busy = True
        engine.submit(1, DUMP, whole_pages(rank, [(4,)]), arena)
        engine.submit(2, LOAD, [PagePart(HEADS.slot_bytes, 0, (5,))], arena)
        wait_for(engine, 2)
        device.catch_up()
        wait_for(engine, 1)

    def test_a_fence_and_a_layer_make_the_current_stream_wait_for_the_copies(
        self, device: MainMemory, engine: CopyEngine, rank: Rank
    ) -> None:
        """Points that a lane has put on its stream after the copies, not the host's own waiting."""
        arena = make_arena(1, HEADS)
        parts = whole_pages(rank, [(4,)])
        engine.submit(1, DUMP, parts, arena)
        engine.fence([1])
        assert device.of_lanes[-1:] == device.waited_for

        for layer in range(3):
            engine.submit_layer(2, LOAD, layer, parts, arena)
            engine.wait_layer(layer)
            assert device.of_lanes[-1:] == device.waited_for[-1:]
            engine.wait_layer(layer)
        assert 4 == len(device.waited_for)
        wait_for(engine, 1, 2)
