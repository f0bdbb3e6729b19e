"""Jobs of several targets on a device that works behind the host's back."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from tests.integration.copies.copy_engines import DUMP, HEADS, LARGER
from tests.integration.copies.kv_layouts import page_at, page_of_blocks, wait_for
from tests.integration.copies.test_asynchronous_device import WAYS, Machine
from ucm.integration.copies.jobs import PagePart


@pytest.fixture(params=[False, True], ids=["one by one", "batched"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    machine = Machine(is_batched=request.param)
    yield machine
    machine.close()


@pytest.mark.parametrize("pinned", ["all", "half", "none"])
@pytest.mark.parametrize("way", list(WAYS))
def test_a_job_of_several_targets_ends_once_and_a_fence_covers_all_of_them(
    machine: Machine, way: str, pinned: str
) -> None:
    """The second target is every second layer of other pages, of other blocks."""
    ranks = (
        machine.rank("LBHNC", seed=6, block_tokens=8),
        machine.rank("LBNHC", LARGER, layers=range(1, 5, 2), seed=7, block_tokens=16),
    )
    before = [rank.cache.read().clone() for rank in ranks]
    arena = machine.arena(3, LARGER, pinned=pinned)
    engine = machine.engine(*ranks, way=way)
    forward_ends = threading.Event()
    machine.device.launch(forward_ends.wait)
    engine.order_after_forward()
    parts = [
        PagePart(0, 0, (3, 1, 2, 6)),
        PagePart(LARGER.slot_bytes, 0, (5, 4), 23, target=1),
        PagePart(2 * LARGER.slot_bytes, 8, (7,)),
    ]
    engine.submit(1, DUMP, parts, arena)
    engine.fence([1])
    for rank in ranks:
        machine.overwrite(rank, -1)
    assert engine.finished() == []
    forward_ends.set()
    wait_for(engine, 1)

    whole, tail, part = (
        page_at(arena.bytes, geometry, slot * LARGER.slot_bytes)
        for slot, geometry in enumerate((HEADS, LARGER, HEADS))
    )
    assert torch.equal(page_of_blocks(before[0], (3, 1, 2, 6)), whole)
    assert torch.equal(page_of_blocks(before[1], (5, 4))[:, :, :23], tail[1::2, :, :23])
    assert not bool(tail[1::2, :, 23:].any())
    assert bool((tail[::2].contiguous().view(torch.uint8) == 0xEE).all())
    assert torch.equal(page_of_blocks(before[0], (7,)), part[:, :, 8:16])
