"""Probes of what copies and registrations do to an engine that runs beside them."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.first_look.copies import LARGE, SMALL
from benchmarks.first_look.place import GOOD, LOOK, SKIPPED, Finding, Place, whole
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.jobs import Direction


def uploads(place: Place) -> Finding:
    """What the upload of block ids costs the host while the stream is behind."""
    if not place.is_asynchronous:
        return Finding(SKIPPED, "the CPU uploads nothing")
    accelerator = place.accelerator()
    ids = np.arange(1024, dtype=np.int64)
    accelerator.upload(ids)
    place.synchronize()
    times: dict[str, float] = {}
    ways: dict[str, Callable[[], object]] = {"pinned": lambda: accelerator.upload(ids)}
    if place.is_real:
        plain = torch.from_numpy(ids)
        ways["pageable"] = lambda: plain.to(place.device, non_blocking=True)
    for name, upload in ways.items():
        place.busy()
        started_s = time.perf_counter()
        upload()
        times[name] = time.perf_counter() - started_s
        place.synchronize()
    rows = [(f"8 KiB, {name}", f"{value * 1e3:.2f} ms") for name, value in times.items()]
    verdict = LOOK if times["pinned"] > 0.005 else GOOD
    return Finding(verdict, f"pinned ids take {times['pinned'] * 1e3:.2f} ms of the host", rows)


def pinning(place: Place) -> Finding:
    """How long a registration takes, and the worst kernel launch beside it, by size."""
    if not place.is_asynchronous:
        return Finding(SKIPPED, "the CPU pins nothing")
    sizes_mb = (16, 64, 256, 1024, 4096) if place.is_real else (1, 4)
    rows, worst_of_64 = [], 0.0
    for size_mb in sizes_mb:
        arena = _populated(place, size_mb << 20)
        took: list[float] = []

        def register(arena: Arena = arena, took: list[float] = took) -> None:
            started_s = time.perf_counter()
            if refused := arena.prepare(0, arena.bytes.numel()):
                raise RuntimeError(refused)
            took.append(time.perf_counter() - started_s)

        worst_s = _worst_launch_beside(place, register)
        arena.close()
        if not took:
            return Finding(LOOK, f"{size_mb} MiB can't be pinned", rows)
        worst_of_64 = worst_s if size_mb == 64 else worst_of_64
        shown = f"{took[0] * 1e3:7.1f} ms, worst launch {worst_s * 1e3:.2f} ms"
        rows.append((f"{size_mb} MiB", shown))
    verdict = LOOK if worst_of_64 > 0.03 else GOOD
    return Finding(verdict, f"beside 64 MiB the worst launch took {worst_of_64 * 1e3:.1f} ms", rows)


def _populated(place: Place, nbytes: int) -> Arena:
    """Memory as a node cache shares it: its pages taken by somebody else."""
    fd = os.memfd_create("slots")
    os.ftruncate(fd, nbytes)
    os.posix_fallocate(fd, 0, nbytes)
    try:
        registrar = None if place.is_real else place.stand_in
        return Arena(mmap.mmap(fd, nbytes), device=place.device, registrar=registrar)
    finally:
        os.close(fd)


def _worst_launch_beside(place: Place, action: Callable[[], None]) -> float:
    """Of the launches of this thread while another does `action`."""
    tensor = torch.zeros(16, device=place.device)
    thread = threading.Thread(target=action)
    worst_s = 0.0
    thread.start()
    while thread.is_alive():
        started_s = time.perf_counter()
        tensor.add_(1)
        worst_s = max(worst_s, time.perf_counter() - started_s)
    thread.join()
    place.synchronize()
    return worst_s


def neighbours(place: Place) -> Finding:
    """Small copies and matrix products of the engine, alone and beside loads and dumps."""
    if not place.is_real:
        return Finding(SKIPPED, "times of a stand-in mean nothing")
    small = torch.ones(4096, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(small, device=place.device)
    a = torch.randn(4096, 4096, device=place.device, dtype=torch.bfloat16)

    def multiply() -> None:
        for _ in range(20):
            torch.mm(a, a)

    stream = torch.Stream(device=place.device)
    torch.accelerator.set_stream(stream)

    def timed(action: Callable[[], None]) -> float:
        times = []
        for _ in range(50):
            started_s = time.perf_counter()
            action()
            stream.synchronize()
            times.append(time.perf_counter() - started_s)
        return sorted(times)[len(times) * 9 // 10]

    def small_here() -> None:
        there.copy_(small, non_blocking=True)

    rows, worst = [], 1.0
    alone = {name: timed(act) for name, act in (("4 KiB", small_here), ("20 mm", multiply))}
    rows += [(f"{name} alone, 90 %", f"{t * 1e3:.2f} ms") for name, t in alone.items()]
    for direction in Direction:
        with _CopiesBeside(place, direction):
            beside = {n: timed(act) for n, act in (("4 KiB", small_here), ("20 mm", multiply))}
        rows += [
            (f"{name} beside a {direction.value}", f"{t * 1e3:.2f} ms")
            for name, t in beside.items()
        ]
        worst = max(worst, beside["20 mm"] / alone["20 mm"])
    verdict = LOOK if worst > 1.3 else GOOD
    return Finding(verdict, f"matrix products take {worst:.2f} times as long beside copies", rows)


class _CopiesBeside:
    """One copy after the other, until the end."""

    def __init__(self, place: Place, direction: Direction) -> None:
        geometry = LARGE if place.is_real else SMALL
        rank = place.rank("LBNHC", geometry, num_blocks=8)
        self._engine = place.engine(rank)
        self._arena, self._parts = place.arena(8, geometry), whole(rank, 8)
        self._direction = direction
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        # The events of the engine are of this thread's stream, which is the measured one.
        self._engine.order_after_forward()
        self._engine.order_before_forward()
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        job = 0
        while not self._stopped.is_set():
            job += 1
            self._engine.submit(job, self._direction, self._parts, self._arena)
            self._engine.wait_for_news(10)
            self._engine.finished()
