"""Copies as an NPU may be asked for them: blocks of whole tensors, and nothing of views."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.integration.copies.copy_engines import (
    DUMP,
    HEADS,
    LOAD,
    MainMemory,
    copy_and_wait,
    on_device,
    rank_of,
)
from tests.integration.copies.kv_layouts import make_arena, page_in, page_of_blocks, whole_pages
from ucm.errors import UnsupportedEngine
from ucm.integration.ascend.accelerator import NpuAccelerator, accelerator_for, refuse_gaps
from ucm.integration.copies.registration import registrar_for

WHOLE = ["split_tuple", "split_tensor", "latent_tuple", "rope_halves", "LBHNC", "LBNHC"]


class Watch(TorchDispatchMode):
    """What is indexed by whole blocks has no gaps, in the order of its dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.indexed: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("index", "index_put", "index_put_", "_index_put_impl_"):
            self.indexed.append(args[0].is_contiguous() and args[1][0] is not None)
        return func(*args, **(kwargs or {}))


class Watched(MainMemory):
    def __init__(self) -> None:
        super().__init__()
        self.watch = Watch()

    def gather(self, blocks, ids, into) -> None:
        with self.watch:
            super().gather(blocks, ids, into)

    def scatter(self, blocks, ids, out_of) -> None:
        with self.watch:
            super().scatter(blocks, ids, out_of)


class NpuMemory(Watched, NpuAccelerator):
    """Main memory in place of an NPU."""

    def gather(self, blocks, ids, into) -> None:
        with self.watch:
            NpuAccelerator.gather(self, blocks, ids, into)

    def scatter(self, blocks, ids, out_of) -> None:
        with self.watch:
            NpuAccelerator.scatter(self, blocks, ids, out_of)


def engine_on(memory: MainMemory, *, staging_bytes: int) -> Callable[..., Any]:
    return on_device(staging_bytes=staging_bytes, direct_run_bytes=1 << 30, accelerator=memory)


@pytest.mark.parametrize("staging_bytes", [1 << 20, 5000])
@pytest.mark.parametrize("block_tokens", [32, 8])
@pytest.mark.parametrize("layout", WHOLE)
def test_blocks_are_read_and_written_in_the_order_of_their_memory(
    layout: str, block_tokens: int, staging_bytes: int
) -> None:
    source = rank_of(layout, seed=1, block_tokens=block_tokens, num_blocks=16)
    target = rank_of(layout, block_tokens=block_tokens, num_blocks=16)
    blocks = [(3,), (7,), (0,)] if block_tokens == 32 else [(3, 9, 15, 0), (4, 5, 6, 7)]
    arena = make_arena(len(blocks), source.geometry)
    memory = NpuMemory()
    dumping = engine_on(memory, staging_bytes=staging_bytes)(source)
    copy_and_wait(dumping, DUMP, whole_pages(source, blocks), arena)
    dumping.close()
    for slot, block_ids in enumerate(blocks):
        expected = page_of_blocks(source.cache.read(), block_ids)
        assert torch.equal(expected, page_in(arena, source.geometry, slot))

    loading = engine_on(memory, staging_bytes=staging_bytes)(target)
    copy_and_wait(loading, LOAD, whole_pages(target, blocks), arena)
    loading.close()
    named = sorted(block for block_ids in blocks for block in block_ids)
    others = sorted(set(range(16)) - set(named))
    assert torch.equal(source.cache.read()[:, named], target.cache.read()[:, named])
    assert not bool(target.cache.read()[:, others].any())
    assert memory.watch.indexed and all(memory.watch.indexed)


def test_other_devices_are_asked_for_views() -> None:
    """Or the test above could not fail."""
    memory, rank = Watched(), rank_of("split_tuple", seed=1)
    engine = engine_on(memory, staging_bytes=1 << 20)(rank)
    copy_and_wait(engine, LOAD, whole_pages(rank, [(3,)]), make_arena(1, rank.geometry))
    engine.close()
    assert memory.watch.indexed and not any(memory.watch.indexed)


@pytest.mark.parametrize("layout", WHOLE)
def test_layers_without_gaps_are_taken(layout: str) -> None:
    refuse_gaps([rank_of(layout).target()])


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ("split_in_blocks", "[8, 4, 32, 16] with strides [4096, 16, 64, 1]"),
        ("BLHNC", "[8, 4, 32, 32] with strides [12288, 1024, 32, 1]"),
        ("LHBNC", "[8, 4, 32, 32] with strides [1024, 8192, 32, 1]"),
    ],
)
def test_layers_with_gaps_between_their_blocks_are_refused(layout: str, told: str) -> None:
    with pytest.raises(UnsupportedEngine, match=re.escape(f"layer 0 has parts {told}")):
        refuse_gaps([rank_of(layout).target()])


def test_slots_are_not_registered_with_a_driver_that_torch_has_no_call_of() -> None:
    """Copies go by the pinned ring then, and nothing is touched in advance."""
    device = torch.device("privateuseone", 0)
    arena = make_arena(2, HEADS, device)
    nbytes = arena.bytes.numel()
    assert registrar_for(device) is None and arena.pins
    assert arena.prepare(0, nbytes) == ""
    assert [piece.pinned for piece in arena.pieces(0, nbytes)] == [False]
    assert arena.close()


def test_other_devices_have_their_own_door() -> None:
    assert accelerator_for([rank_of("BLHNC").target()]) is None
