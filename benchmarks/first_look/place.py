"""Where a probe runs: on an accelerator, on the tests' stand-in for one, or on the CPU.

The stand-in has streams, memory that the host can't touch and CUDA's rules, and no speed: on it and
on the CPU the probes show that they work, and their times mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.integration.copies.kv_layouts import Rank, make_arena, make_rank
from tests.integration.copies.simulated_device import SimulatedDevice
from ucm.integration.copies.accelerator import Accelerator, BatchedCopy
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.copy_engine import CopyEngine
from ucm.integration.copies.device import CopyLimits, DeviceCopyEngine
from ucm.integration.copies.jobs import Direction, PagePart
from ucm.integration.copies.make import make_copy_engine
from ucm.store.blocks.page_layout import PageGeometry

PLACES = ("accelerator", "stand-in", "cpu")
GOOD, BAD, LOOK, SKIPPED = "good", "BAD", "look", "skipped"


@dataclass
class Finding:
    """What a probe says: a verdict, one sentence, and rows of a table."""

    verdict: str
    says: str
    rows: list[tuple[str, str]] = field(default_factory=list)


class Counting:
    """An accelerator of which every call is counted: what each costs the lane's thread."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._accelerator, name)
        if not callable(value) or name in ("empty", "pinned", "use_own_stream"):
            return value

        def counted(*args: Any) -> Any:
            times = len(args[0]) if name == "copy" else 1
            self.calls[name] = self.calls.get(name, 0) + times
            return value(*args)

        return counted


class Place:
    """Makes what probes need, and closes it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = torch.device("cpu")
        self._stand_in = SimulatedDevice(max_delay_s=0.0002) if name == "stand-in" else None
        if name == "accelerator":
            kind = torch.accelerator.current_accelerator()
            assert kind is not None, "torch finds no accelerator"
            self.device = torch.device(kind.type, torch.accelerator.current_device_index())
        self._engines: list[CopyEngine] = []
        self._arenas: list[Arena] = []

    @property
    def is_real(self) -> bool:
        return self.name == "accelerator"

    @property
    def is_asynchronous(self) -> bool:
        return self.name != "cpu"

    @property
    def stand_in(self) -> SimulatedDevice:
        assert self._stand_in is not None
        return self._stand_in

    def accelerator(self, *, batched: BatchedCopy | None = None) -> Any:
        return self._stand_in or Accelerator(self.device, batched=batched)

    def rank(self, layout: str, geometry: PageGeometry, **more: Any) -> Rank:
        rank = make_rank(layout, geometry, device=self.device, **more)
        return self._stand_in.moved(rank) if self._stand_in else rank

    def engine(self, rank: Rank, *, accelerator: Any = None, **more: Any) -> CopyEngine:
        if self.name == "cpu":
            made: CopyEngine = make_copy_engine([rank.target()])
        else:
            made = DeviceCopyEngine(
                [rank.target()],
                accelerator=accelerator or self.accelerator(),
                limits=CopyLimits(fence_grace_s=30.0, **more),
            )
        self._engines.append(made)
        return made

    def arena(self, num_pages: int, geometry: PageGeometry, *, pinned: str = "all") -> Arena:
        if self._stand_in is not None:
            arena = self._stand_in.arena(num_pages, geometry)
        else:
            arena = make_arena(num_pages, geometry, self.device if self.is_real else None)
        self._arenas.append(arena)
        parts = {"all": 1.0, "half": 0.5, "none": 0.0}[pinned]
        nbytes = int(arena.bytes.numel() * parts) // 4096 * 4096
        if nbytes and (refused := arena.prepare(0, nbytes)):
            raise RuntimeError(f"can't pin {nbytes >> 20} MiB: {refused}")
        return arena

    def write(self, rank: Rank, value: int) -> None:
        """A kernel that writes all of a cache, on the current stream."""
        tensors = [t for kv in rank.cache.layers for t in ([kv] if torch.is_tensor(kv) else kv)]
        if self._stand_in is None:
            for tensor in tensors:
                tensor.fill_(value)
        else:
            real = [self._stand_in.real(t) for t in tensors]
            self._stand_in.launch(lambda: [t.fill_(value) for t in real])

    def busy(self) -> None:
        """Some tens of milliseconds of work on the current stream."""
        if self.is_real:
            a = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
            for _ in range(200):
                torch.mm(a, a)
        elif self._stand_in is not None:
            self._stand_in.launch(lambda: time.sleep(0.02))

    def synchronize(self) -> None:
        if self.is_real:
            torch.accelerator.synchronize()
        elif self._stand_in is not None:
            self._stand_in.synchronize()

    def clear(self) -> None:
        """Between the cases of a probe: what was made is not used any more."""
        for engine in self._engines:
            engine.close()
        for arena in self._arenas:
            arena.close()
        self._engines, self._arenas = [], []
        if self._stand_in is not None:
            self._stand_in.forget_memory()

    def close(self) -> None:
        self.clear()
        if self._stand_in is not None:
            self._stand_in.close()


def whole(rank: Rank, num_pages: int, *, first_slot: int = 0) -> list[PagePart]:
    """Pages of neighbouring blocks, in an order that is none."""
    per_page = rank.geometry.block_tokens // rank.block_tokens
    order = torch.randperm(num_pages * per_page, generator=torch.Generator().manual_seed(1))
    ids = order.view(num_pages, per_page).tolist()
    return [
        PagePart((first_slot + i) * rank.geometry.slot_bytes, 0, tuple(blocks))
        for i, blocks in enumerate(ids)
    ]


def run_job(
    engine: CopyEngine, job_id: int, direction: Direction, parts: list[PagePart], arena: Arena
) -> None:
    engine.submit(job_id, direction, parts, arena)
    wait_for(engine, job_id)


def wait_for(engine: CopyEngine, *job_ids: int, timeout_s: float = 60.0) -> None:
    left, deadline_s = set(job_ids), time.monotonic() + timeout_s
    while left:
        left -= set(engine.finished())
        if failed := engine.failed():
            raise RuntimeError(f"jobs {failed} failed")
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"jobs {sorted(left)} have not ended in {timeout_s:.0f} s")
        time.sleep(0.0001)


def seconds(action: Callable[[], object], place: Place, *, repeats: int = 5) -> float:
    """The best of some."""
    best = float("inf")
    for _ in range(repeats):
        place.synchronize()
        started_s = time.perf_counter()
        action()
        place.synchronize()
        best = min(best, time.perf_counter() - started_s)
    return best
