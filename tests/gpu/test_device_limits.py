"""What copies may take from an engine that runs beside them: its thread, its memory, its graphs."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from tests.gpu.caches import DUMP, HEADS, LOAD, PAGES, MakeEngine, rank_of
from tests.gpu.test_device_order import Busy
from tests.integration.copies.kv_layouts import (
    make_arena,
    page_in,
    page_of_blocks,
    wait_for,
    whole_pages,
)
from ucm.integration.copies.accelerator import Accelerator
from ucm.integration.copies.jobs import PagePart
from ucm.integration.copies.pinning import Preparer


def test_an_upload_of_block_ids_returns_while_the_stream_is_behind(device: torch.device) -> None:
    accelerator = Accelerator(device)
    accelerator.upload(np.arange(1000, dtype=np.int64))
    kernels = Busy(device).start()
    uploaded = accelerator.upload(np.arange(1000, dtype=np.int64))
    assert not kernels.query()
    assert torch.equal(uploaded.cpu(), torch.arange(1000))


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
def test_a_fence_returns_while_the_forward_pass_before_the_dumps_runs(
    device: torch.device, make: MakeEngine, new_arena, layout: str
) -> None:
    """By the ring too: what doesn't get under way is given up, and nothing that is called good has
    other bytes than those of its time."""
    rank = rank_of(layout, device, seed=4)
    before = rank.cache.read()
    arena = new_arena(HEADS)
    engine = make(rank, fence_grace_s=0.2)
    busy = Busy(device)
    kernels = busy.start()
    engine.order_after_forward()
    for slot in range(PAGES):
        part = PagePart(slot * HEADS.slot_bytes, 0, (slot,))
        engine.submit(slot, DUMP, [part], arena)
    engine.fence(range(PAGES))
    assert not kernels.query()
    for kv in rank.cache.layers:
        assert isinstance(kv, torch.Tensor)
        kv.fill_(-1)
    ended: list[int] = []
    while len(ended) < PAGES:
        ended += engine.finished()
    for slot in set(range(PAGES)) - set(engine.failed()):
        assert torch.equal(page_of_blocks(before, [slot]), page_in(arena, HEADS, slot))


def test_copies_take_no_more_device_memory_than_their_staging(
    device: torch.device, make: MakeEngine, new_arena
) -> None:
    """vLLM has given itself the rest."""
    rank = rank_of("LBNHC", device, seed=1, num_blocks=PAGES)
    arena = new_arena(HEADS)
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    engine = make(rank)
    parts = whole_pages(rank, [(i,) for i in range(PAGES)])
    for job, direction in enumerate((DUMP, LOAD, DUMP, LOAD)):
        engine.submit(job, direction, parts, arena)
        wait_for(engine, job)
    taken = torch.accelerator.max_memory_allocated(device) - before
    assert taken <= (2 * 16 << 20) + (1 << 20)


def test_memory_that_is_refused_during_a_capture_is_pinned_after_it(device: torch.device) -> None:
    """And the engine's own captures, which come before its first step, are left alone."""
    if device.type != "cuda":
        pytest.skip("no graphs are captured there")
    arena = make_arena(PAGES, HEADS, device)
    preparer = Preparer(pins=True, first_retry_s=0.1)
    preparer.start()
    preparer.add(arena, 0, arena.bytes.numel())
    tensor = torch.zeros(16, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="global"):
        tensor.add_(1)
        time.sleep(0.3)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((tensor == 1).all())
    assert not any(piece.pinned for piece in arena.pieces(0, arena.bytes.numel()))

    # A capture while the engine serves: spoiled or not, the memory is pinned when it is over.
    preparer.allow()
    started = threading.Event()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="global"):
            started.wait(0.3)
    except RuntimeError:
        pass
    deadline = time.monotonic() + 30
    while not all(piece.pinned for piece in arena.pieces(0, arena.bytes.numel())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    preparer.stop()
    preparer.join(10)
    assert arena.close()
