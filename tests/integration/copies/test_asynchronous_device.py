"""Copies on a device that works behind the host's back: bytes, order, and who waits for whom."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
import torch

from tests.integration.copies.copy_engines import BIG, DUMP, HEADS, LATENT, LOAD, copy_and_wait
from tests.integration.copies.kv_layouts import (
    LATENT_LAYOUTS,
    LAYOUTS,
    Rank,
    make_rank,
    page_in,
    page_of_blocks,
    wait_for,
    whole_pages,
)
from tests.integration.copies.simulated_device import SimulatedDevice
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.copy_engine import CopyEngine
from ucm.integration.copies.device import CopyLimits, DeviceCopyEngine
from ucm.integration.copies.jobs import PagePart

WAYS = {
    "direct": {"staging_bytes": 1 << 20, "direct_run_bytes": 1},
    "staged": {"staging_bytes": 1 << 20, "direct_run_bytes": 1 << 30},
    "tiny staging": {"staging_bytes": 5000, "direct_run_bytes": 1 << 30},
}


class Machine:
    """A device and what a test makes on it."""

    def __init__(self, **options) -> None:
        self.device = SimulatedDevice(**options)
        self.engines: list[CopyEngine] = []
        self.arenas: list[Arena] = []

    def rank(self, layout: str, geometry=None, **more) -> Rank:
        geometry = geometry or (LATENT if layout in LATENT_LAYOUTS else HEADS)
        return self.device.moved(make_rank(layout, geometry, **more))

    def engine(self, *ranks: Rank, way: str = "direct", **more) -> CopyEngine:
        options = {"fence_grace_s": 30.0, **WAYS[way], **more}
        self.engines.append(
            DeviceCopyEngine(
                [rank.target() for rank in ranks],
                accelerator=self.device,
                limits=CopyLimits(**options),
            )
        )
        return self.engines[-1]

    def arena(self, num_pages: int, geometry=HEADS, *, pinned: str = "all") -> Arena:
        arena = self.device.arena(num_pages, geometry)
        self.arenas.append(arena)
        half = arena.bytes.numel() // 2 // 4096 * 4096
        if pinned == "all":
            assert not arena.prepare(0, half)
            assert not arena.prepare(0, arena.bytes.numel())
        elif pinned == "half":
            assert not arena.prepare(0, half)
        return arena

    def overwrite(self, rank: Rank, value: int) -> None:
        """A kernel that writes all of a cache."""
        tensors = [t for kv in rank.cache.layers for t in ([kv] if torch.is_tensor(kv) else kv)]
        real = [self.device.real(t) for t in tensors]
        self.device.launch(lambda: [t.fill_(value) for t in real])

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        for arena in self.arenas:
            assert arena.close()
        self.device.close()


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine = Machine(**getattr(request, "param", {}))
    yield machine
    machine.close()


@pytest.mark.parametrize("pinned", ["all", "half", "none"])
@pytest.mark.parametrize("layout", [*LAYOUTS, *LATENT_LAYOUTS])
def test_pages_go_out_and_come_back_bit_for_bit(layout: str, pinned: str) -> None:
    """By every route, one by one and in batches, and into the named blocks only."""
    blocks = [(3, 9, 15, 0), (4, 5, 6, 7), (8, 2, 1, 12)]
    for seed, way in enumerate(WAYS):
        machine = Machine(seed=seed, is_batched=seed == 1)
        source = machine.rank(layout, seed=1, block_tokens=8, num_blocks=16)
        target = machine.rank(layout, block_tokens=8, num_blocks=16)
        arena = machine.arena(3, source.geometry, pinned=pinned)
        before = source.cache.read().clone()
        copy_and_wait(machine.engine(source, way=way), DUMP, whole_pages(source, blocks), arena)
        for slot, block_ids in enumerate(blocks):
            expected = page_of_blocks(before, block_ids)
            assert torch.equal(expected, page_in(arena, source.geometry, slot))
        copy_and_wait(machine.engine(target, way=way), LOAD, whole_pages(target, blocks), arena)
        named = sorted(block for ids in blocks for block in ids)
        loaded = target.cache.read()
        assert torch.equal(before[:, named], loaded[:, named])
        assert not bool(loaded[:, sorted(set(range(16)) - set(named))].any())
        for engine in machine.engines:
            engine.close()
        assert arena.close()
        machine.device.close()


@pytest.mark.parametrize("pinned", ["all", "half", "none"])
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("layerwise", [False, True])
def test_what_is_behind_a_tail_is_blank_when_its_copies_have_landed(
    machine: Machine, way: str, pinned: str, layerwise: bool
) -> None:
    """They bring whole blocks of the engine: what was blank before them is not after them."""
    rank = machine.rank("LBNHC", seed=5, block_tokens=8)
    arena = machine.arena(2, pinned=pinned)
    before = rank.cache.read().clone()
    engine = machine.engine(rank, way=way)
    forward_ends = threading.Event()
    machine.device.launch(forward_ends.wait)
    engine.order_after_forward()
    parts = [PagePart(slot * HEADS.slot_bytes, 0, (3 * slot + 1, 3), 11) for slot in range(2)]
    if layerwise:
        for layer in range(HEADS.num_layers):
            engine.submit_layer(1, DUMP, layer, parts, arena)
    else:
        engine.submit(1, DUMP, parts, arena)
    engine.fence([1])
    assert engine.finished() == []
    forward_ends.set()
    wait_for(engine, 1)

    for slot in range(2):
        page = page_in(arena, HEADS, slot)
        held = page_of_blocks(before, (3 * slot + 1, 3))
        assert torch.equal(held[:, :, :11], page[:, :, :11])
        assert not bool(page[:, :, 11:].any())


@pytest.mark.parametrize("machine", [{"is_batched": True}], indirect=True, ids=["batched"])
@pytest.mark.parametrize("way", ["direct", "staged"])
def test_all_runs_of_a_rank_among_many_are_one_call_into_the_driver(
    machine: Machine, way: str
) -> None:
    """A rank that holds some of the heads has a run per layer and page."""
    rank = machine.rank("LBHNC", tp=(1, 2), seed=2)
    arena = machine.arena(4)
    blocks = [(3,), (7,), (0,), (5,)]
    copy_and_wait(machine.engine(rank, way=way), DUMP, whole_pages(rank, blocks), arena)

    calls = [call for call in machine.device.calls if call.startswith("batched")]
    assert calls == [f"batched {4 * HEADS.num_layers}"]
    pages = torch.cat([page_in(arena, HEADS, slot)[:, 2:] for slot in range(4)], dim=2)
    assert torch.equal(page_of_blocks(rank.cache.read(), [3, 7, 0, 5]), pages)


@pytest.mark.parametrize("fails", [1, 99], ids=["once", "always"])
def test_where_the_batched_call_fails_copies_go_one_by_one(machine: Machine, fails: int) -> None:
    """Once is no verdict: only where it fails again and again it is not tried any more."""
    calls: list[int] = []

    def fail(sources, targets, sizes) -> None:
        calls.append(sizes.numel())
        if len(calls) <= fails:
            raise RuntimeError("the driver is too old for cuMemcpyBatchAsync")
        machine.device._copy_batched(sources, targets, sizes)

    machine.device.batched = fail
    rank = machine.rank("LBHNC", seed=2)
    arena = machine.arena(1)
    engine = machine.engine(rank)
    for job in range(5):
        page_in(arena, HEADS, 0).fill_(0)
        engine.submit(job, DUMP, whole_pages(rank, [(3,)]), arena)
        wait_for(engine, job)
        assert torch.equal(page_of_blocks(rank.cache.read(), [3]), page_in(arena, HEADS, 0))
    assert len(calls) == (5 if fails == 1 else 3)


@pytest.mark.parametrize("machine", [{"is_batched": True}], indirect=True, ids=["batched"])
def test_no_transfer_is_so_long_that_others_wait_for_it(machine: Machine) -> None:
    """A page is one run, of 16 MB here; the engine's small copies get in between."""
    sizes: list[int] = []
    batched = machine.device.batched

    def note(sources, targets, nbytes) -> None:
        sizes.extend(nbytes.tolist())
        batched(sources, targets, nbytes)

    machine.device.batched = note
    rank = machine.rank("BLHNC", BIG, seed=3, num_blocks=1)
    arena = machine.arena(1, BIG)
    copy_and_wait(machine.engine(rank), DUMP, whole_pages(rank, [(0,)]), arena)

    assert max(sizes) <= 4 << 20
    assert sum(sizes) == BIG.page_bytes
    assert torch.equal(page_of_blocks(rank.cache.read(), [0]), page_in(arena, BIG, 0))


def test_a_ring_buffer_is_used_again_only_after_its_copy(machine: Machine) -> None:
    """Both ways: 50 MB by four buffers of 8 MiB, and nothing but pinned memory for the device."""
    rank = machine.rank("LBHNC", BIG, seed=15, num_blocks=3)
    target = machine.rank("LBHNC", BIG, num_blocks=3)
    arena = machine.arena(3, BIG, pinned="none")
    blocks = [(0,), (1,), (2,)]
    copy_and_wait(machine.engine(rank), DUMP, whole_pages(rank, blocks), arena)
    for slot in range(3):
        assert torch.equal(page_of_blocks(rank.cache.read(), [slot]), page_in(arena, BIG, slot))
    copy_and_wait(machine.engine(target), LOAD, whole_pages(target, blocks), arena)
    assert torch.equal(rank.cache.read(), target.cache.read())


@pytest.mark.parametrize("pinned", ["all", "none"])
@pytest.mark.parametrize("way", ["direct", "staged"])
def test_a_fence_does_not_wait_for_the_forward_pass_before_the_dumps(
    machine: Machine, way: str, pinned: str
) -> None:
    """Nor do the dumps behind it wait for each other: all are on their stream at once, by the ring
    too, whose buffers are emptied when their time has come."""
    rank = machine.rank("LBHNC", seed=4)
    arena = machine.arena(4, pinned=pinned)
    before = rank.cache.read().clone()
    engine = machine.engine(rank, way=way)
    forward_ends = threading.Event()
    machine.device.launch(forward_ends.wait)
    engine.order_after_forward()
    for job in range(4):
        engine.submit(job, DUMP, [PagePart(job * HEADS.slot_bytes, 0, (job,))], arena)
    engine.fence(range(4))
    machine.overwrite(rank, -1)
    assert engine.finished() == []
    forward_ends.set()
    wait_for(engine, *range(4))

    for slot in range(4):
        assert torch.equal(page_of_blocks(before, [slot]), page_in(arena, HEADS, slot))


def test_block_ids_are_uploaded_before_the_stream_waits_for_anything(machine: Machine) -> None:
    rank = machine.rank("LBHNC", seed=4)
    engine = machine.engine(rank, way="staged")
    machine.device.calls.clear()
    copy_and_wait(engine, DUMP, whole_pages(rank, [(2,), (3,)]), machine.arena(2))

    assert [call for call in machine.device.calls if "register" not in call] == ["upload", "wait"]


def test_a_dump_that_can_t_get_under_way_before_a_fence_is_given_up(machine: Machine) -> None:
    """The ring is too small for it before the forward pass ends, which the fence must not wait
    for: its blocks are others' now, so it must not be called good."""
    rank = machine.rank("LBHNC", BIG, seed=5, num_blocks=3)
    arena = machine.arena(3, BIG, pinned="none")
    engine = machine.engine(rank, fence_grace_s=0.05)
    forward_ends = threading.Event()
    machine.device.launch(forward_ends.wait)
    engine.submit(1, DUMP, whole_pages(rank, [(0,), (1,), (2,)]), arena)
    engine.fence([1])
    forward_ends.set()
    ended: list[int] = []
    while not ended:
        ended = engine.finished()
    assert (ended, engine.failed()) == ([1], [1])

    copy_and_wait(engine, DUMP, whole_pages(rank, [(2,)]), arena)
    assert torch.equal(page_of_blocks(rank.cache.read(), [2]), page_in(arena, BIG, 0))


@pytest.mark.parametrize("pinned", ["all", "half", "none"])
@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(2, 8))]
)
def test_whatever_the_device_s_pace_dumps_have_the_bytes_of_their_time(
    seed: int, pinned: str
) -> None:
    """Kernels write the blocks anew each step; loads and dumps of a step belong to what is written
    then, and a fence is before each overwriting."""
    machine = Machine(seed=100 * seed, is_batched=bool(seed % 2))
    rank = machine.rank("LBNHC", num_blocks=8, seed=0)
    engine = machine.engine(rank, way=list(WAYS)[seed % 3])
    arena = machine.arena(8, pinned=pinned)
    draw = random.Random(seed)
    for step in range(1, 9):
        machine.overwrite(rank, step)
        engine.order_after_forward()
        slots = draw.sample(range(8), 3)
        jobs = [10 * step + i for i in range(3)]
        for job, slot in zip(jobs, slots, strict=True):
            engine.submit(job, DUMP, [PagePart(slot * HEADS.slot_bytes, 0, (slot,))], arena)
        engine.fence(jobs)
        machine.overwrite(rank, -step)
        engine.order_before_forward()
        other = next(slot for slot in range(8) if slot not in slots)
        arena_page = page_in(arena, HEADS, other)
        if step == 1:
            arena_page.fill_(77)
        expected = int(arena_page.flatten()[0])
        engine.submit(10 * step + 5, LOAD, [PagePart(other * HEADS.slot_bytes, 0, (other,))], arena)
        wait_for(engine, *jobs, 10 * step + 5)
        for slot in slots:
            assert bool((page_in(arena, HEADS, slot) == step).all())
        machine.device.synchronize()
        assert bool((page_of_blocks(rank.cache.read(), [other]) == expected).all())
    engine.close()
    assert arena.close()
    machine.device.close()
