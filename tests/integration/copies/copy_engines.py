"""The copy engines as the tests run them, and main memory in place of a device.

`host` is the engine of CPU machines. `direct`, `staged` and `tiny staging` are the engine of
accelerators with main memory behind its door: its plans, its lanes and its ring are the real ones,
only a stream does at once what it is asked to. tests/gpu runs the same checks on a device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from tests.integration.copies.kv_layouts import Rank, geometry_for, make_rank, wait_for
from ucm.integration.copies.accelerator import Accelerator
from ucm.integration.copies.arena import Arena, Piece
from ucm.integration.copies.copy_engine import CopyEngine
from ucm.integration.copies.device import CopyLimits, DeviceCopyEngine
from ucm.integration.copies.jobs import Direction, PagePart
from ucm.integration.copies.make import make_copy_engine
from ucm.store.blocks.page_layout import PageGeometry

HEADS = PageGeometry(
    num_layers=3, num_kv_heads=4, block_tokens=32, k_size=16, v_size=16, item_bytes=2
)
LARGER = PageGeometry(
    num_layers=5, num_kv_heads=8, block_tokens=64, k_size=24, v_size=24, item_bytes=2
)
LATENT = PageGeometry(
    num_layers=3, num_kv_heads=1, block_tokens=32, k_size=72, v_size=0, item_bytes=2
)
BIG = PageGeometry(
    num_layers=2, num_kv_heads=8, block_tokens=1024, k_size=256, v_size=256, item_bytes=2
)
LOAD, DUMP = Direction.LOAD, Direction.DUMP


class Point:
    """An event of a stream that is never behind, unless a test holds it back."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.reached.set()

    def query(self) -> bool:
        return self.reached.is_set()

    def synchronize(self) -> None:
        assert self.reached.wait(30)


class MainMemory(Accelerator):
    """Main memory in place of a device. While `busy`, what the rank's own thread has queued never
    ends: `record` gives points that only `catch_up` reaches."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._rank_thread = threading.current_thread()
        self._behind: list[Point] = []
        self.busy = False
        self.of_lanes: list[Point] = []
        self.waited_for: list[Point] = []

    def use_own_stream(self) -> None:
        assert threading.current_thread() is not self._rank_thread

    def record(self) -> Point:
        point = Point()
        if threading.current_thread() is not self._rank_thread:
            self.of_lanes.append(point)
        elif self.busy:
            point.reached.clear()
            self._behind.append(point)
        return point

    def wait(self, event) -> None:
        if threading.current_thread() is self._rank_thread:
            self.waited_for.append(event)
        event.synchronize()

    def upload(self, ids) -> torch.Tensor:
        return torch.from_numpy(ids)

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def catch_up(self) -> None:
        self.busy = False
        for point in self._behind:
            point.reached.set()


class StripedArena(Arena):
    """Every other 1000 bytes are pinned."""

    def __init__(self, mapping) -> None:
        super().__init__(mapping)
        nbytes = self.bytes.numel()
        self._registered = [
            Piece(start, min(1000, nbytes - start), pinned=True) for start in range(0, nbytes, 2000)
        ]


# From one rank, or several of which each is a target.
MakeEngine = Callable[..., CopyEngine]


def on_host(*ranks: Rank) -> CopyEngine:
    return make_copy_engine([rank.target() for rank in ranks])


def on_device(
    *, staging_bytes: int, direct_run_bytes: int, accelerator: MainMemory | None = None
) -> MakeEngine:
    return lambda *ranks: DeviceCopyEngine(
        [rank.target() for rank in ranks],
        accelerator=accelerator or MainMemory(),
        limits=CopyLimits(
            staging_bytes=staging_bytes, direct_run_bytes=direct_run_bytes, fence_grace_s=30.0
        ),
    )


ENGINES: dict[str, MakeEngine] = {
    "host": on_host,
    "direct": on_device(staging_bytes=1 << 20, direct_run_bytes=1),
    "staged": on_device(staging_bytes=1 << 20, direct_run_bytes=1 << 30),
    "tiny staging": on_device(staging_bytes=5000, direct_run_bytes=1 << 30),
}


def rank_of(layout: str, **more) -> Rank:
    return make_rank(layout, geometry_for(layout, heads=HEADS, latent=LATENT), **more)


def copy_and_wait(
    engine: CopyEngine, direction: Direction, parts: Sequence[PagePart], arena: Arena
) -> None:
    engine.submit(1, direction, parts, arena)
    wait_for(engine, 1)
