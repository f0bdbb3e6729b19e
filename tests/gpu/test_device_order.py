"""Who waits for whom: on an accelerator, nobody on the forward pass's side."""

from __future__ import annotations

import time

import pytest
import torch

from tests.gpu.caches import DUMP, HEADS, LOAD, PAGES, MakeEngine, rank_of
from tests.integration.copies.kv_layouts import page_in, page_of_blocks, wait_for, whole_pages
from ucm.integration.copies.jobs import Direction, PagePart


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "latent"])
def test_layer_by_layer_both_ways(
    device: torch.device, make: MakeEngine, new_arena, layout: str
) -> None:
    """Each layer is dumped right after the kernel that wrote it, and read right after it was
    waited for, without a wait on the host."""
    source = rank_of(layout, device, seed=4)
    target = rank_of(layout, device)
    arena = new_arena(source.geometry)
    dumping, loading = make(source), make(target)
    parts = whole_pages(source, [(2,), (6,)])
    for layer, kv in enumerate(source.cache.layers):
        assert isinstance(kv, torch.Tensor)
        kv.add_(1)
        dumping.order_after_forward()
        dumping.submit_layer(1, DUMP, layer, parts, arena)
    wait_for(dumping, 1)

    loading.order_before_forward()
    for layer in range(4):
        loading.submit_layer(2, LOAD, layer, parts, arena)
    seen = []
    for layer, kv in enumerate(target.cache.layers):
        assert isinstance(kv, torch.Tensor)
        loading.wait_layer(layer)
        seen.append(kv[[2, 6]].clone())
    wait_for(loading, 2)
    for kv, copy in zip(source.cache.layers, seen, strict=True):
        assert isinstance(kv, torch.Tensor)
        assert torch.equal(kv[[2, 6]], copy)


class Busy:
    """Work for seconds on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._a = torch.randn(4096, 4096, device=device)
        self._b = torch.empty_like(self._a)
        self._run(2)
        torch.accelerator.synchronize()
        start = time.monotonic()
        self._run(10)
        torch.accelerator.synchronize()
        self._times = max(10, int(2.0 * 10 / (time.monotonic() - start)))

    def start(self) -> torch.Event:
        """An event after it all. The host returns from this long before the device is done."""
        self._run(self._times)
        return torch.accelerator.current_stream().record_event()

    def _run(self, times: int) -> None:
        for _ in range(times):
            torch.mm(self._a, self._a, out=self._b)


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
@pytest.mark.parametrize("direction", Direction)
def test_submitting_does_not_wait_for_the_kernels_before_it(
    device: torch.device, make: MakeEngine, new_arena, layout: str, direction: Direction
) -> None:
    """And the copy does: it has not ended while they run."""
    rank = rank_of(layout, device, seed=5)
    arena = new_arena(HEADS)
    engine = make(rank)
    kernels = Busy(device).start()
    for job in range(20):
        engine.submit(job, direction, whole_pages(rank, [(job % 8,)]), arena)
    assert not kernels.query()
    assert engine.finished() == []
    assert not kernels.query()
    wait_for(engine, *range(20))

    assert kernels.query()


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
def test_loads_of_a_step_end_while_its_forward_pass_runs(
    device: torch.device, make: MakeEngine, new_arena, layout: str
) -> None:
    """The first copy is before: it may allocate memory, and that waits for the device."""
    rank = rank_of(layout, device)
    arena = new_arena(HEADS)
    arena.bytes.fill_(0x5A)
    engine = make(rank)
    engine.submit(0, LOAD, whole_pages(rank, [(3,)]), arena)
    wait_for(engine, 0)
    busy = Busy(device)
    engine.order_before_forward()
    kernels = busy.start()
    engine.submit(1, LOAD, whole_pages(rank, [(4,)]), arena)
    wait_for(engine, 1)
    assert not kernels.query()

    assert bool((page_of_blocks(rank.cache.read(), [4]) == 0x5A5A).all())


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC", "split_tensor"])
def test_a_dump_has_what_the_kernel_before_it_wrote_and_not_what_follows_the_fence(
    device: torch.device, make: MakeEngine, new_arena, layout: str
) -> None:
    rank = rank_of(layout, device)
    arena = new_arena(HEADS)
    engine = make(rank)
    Busy(device).start()
    for kv in rank.cache.layers:
        assert isinstance(kv, torch.Tensor)
        kv.fill_(0x1111)
    engine.order_after_forward()
    for slot in range(PAGES):
        engine.submit(slot, DUMP, [PagePart(slot * HEADS.slot_bytes, 0, (slot,))], arena)
    engine.fence(range(PAGES))
    for kv in rank.cache.layers:
        assert isinstance(kv, torch.Tensor)
        kv.fill_(0x2222)
    wait_for(engine, *range(PAGES))

    for slot in range(PAGES):
        assert bool((page_in(arena, HEADS, slot) == 0x1111).all())
    assert bool((rank.cache.read() == 0x2222).all())


def test_a_load_overwrites_what_earlier_kernels_still_write(
    device: torch.device, make: MakeEngine, new_arena
) -> None:
    """An engine that schedules ahead may write a block once more after its request has ended."""
    rank = rank_of("LBHNC", device)
    arena = new_arena(HEADS)
    arena.bytes.fill_(0x33)
    engine = make(rank)
    Busy(device).start()
    for kv in rank.cache.layers:
        assert isinstance(kv, torch.Tensor)
        kv.fill_(0x1111)
    engine.order_before_forward()
    engine.submit(1, LOAD, whole_pages(rank, [(2,)]), arena)
    wait_for(engine, 1)

    assert bool((page_of_blocks(rank.cache.read(), [2]) == 0x3333).all())


def test_closing_lets_submitted_copies_end(
    device: torch.device, make: MakeEngine, new_arena
) -> None:
    rank = rank_of("LBNHC", device, seed=6)
    arena = new_arena(HEADS)
    engine = make(rank)
    for slot in range(PAGES):
        engine.submit(slot, DUMP, [PagePart(slot * HEADS.slot_bytes, 0, (slot,))], arena)
    engine.close()

    assert list(range(PAGES)) == sorted(engine.finished())
    for slot in range(PAGES):
        expected = page_of_blocks(rank.cache.read(), [slot])
        assert torch.equal(expected, page_in(arena, HEADS, slot))
