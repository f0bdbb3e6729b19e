"""Probes of the copies themselves: their bytes, their order, their speed, what they take."""

from __future__ import annotations

import contextlib
import itertools

import torch

from benchmarks.first_look.place import (
    BAD,
    GOOD,
    LOOK,
    SKIPPED,
    Counting,
    Finding,
    Place,
    run_job,
    seconds,
    wait_for,
    whole,
)
from tests.integration.copies.kv_layouts import (
    LATENT_LAYOUTS,
    LAYOUTS,
    Rank,
    page_in,
    page_of_blocks,
)
from ucm.integration.copies.accelerator import BatchedCopy
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.jobs import Direction
from ucm.store.blocks.page_layout import PageGeometry

DUMP, LOAD = Direction.DUMP, Direction.LOAD
SMALL = PageGeometry(
    num_layers=3, num_kv_heads=4, block_tokens=128, k_size=64, v_size=64, item_bytes=2
)
_LATENT = PageGeometry(
    num_layers=3, num_kv_heads=1, block_tokens=128, k_size=144, v_size=0, item_bytes=2
)
# Llama 3 70B: 80 layers, 8 heads of 128.
LARGE = PageGeometry(
    num_layers=80, num_kv_heads=8, block_tokens=128, k_size=128, v_size=128, item_bytes=2
)
_PAGES = 4
_ROUNDS = 8


def identity(place: Place) -> Finding:
    """Every layout, out and back, bit for bit; pinned, half pinned, by the ring."""
    wrong, count = [], 0
    # Half pinned goes both ways; the CPU pins nothing.
    pinnings = ("all", "half", "none") if place.is_real else ("half",)
    for layout in (*LAYOUTS, *LATENT_LAYOUTS):
        geometry = _LATENT if layout in LATENT_LAYOUTS else SMALL
        shares = [(0, 1)] if geometry is _LATENT else [(0, 1), (1, 2)]
        for tokens in (128, 16):
            for tp in shares:
                for pinned in pinnings:
                    count += 1
                    if not _round_trip(place, layout, geometry, tokens, tp, pinned):
                        wrong.append(f"{layout} blocks of {tokens}, TP {tp[1]}, {pinned} pinned")
    says = f"{count} round trips, {len(wrong)} of them wrong"
    return Finding(BAD if wrong else GOOD, says, [(name, "wrong bytes") for name in wrong])


def _round_trip(
    place: Place,
    layout: str,
    geometry: PageGeometry,
    tokens: int,
    tp: tuple[int, int],
    pinned: str,
) -> bool:
    num_blocks = _PAGES * 128 // tokens + 3
    more = {"block_tokens": tokens, "num_blocks": num_blocks, "tp": tp}
    source = place.rank(layout, geometry, seed=1, **more)
    target = place.rank(layout, geometry, **more)
    arena = place.arena(_PAGES, geometry, pinned=pinned)
    parts = whole(source, _PAGES)
    run_job(place.engine(source), 1, DUMP, parts, arena)
    run_job(place.engine(target), 1, LOAD, parts, arena)
    place.synchronize()
    before, after = source.cache.read(), target.cache.read()
    heads = source.share.heads
    pages_right = all(
        torch.equal(
            page_of_blocks(before, part.block_ids),
            page_in(arena, geometry, slot)[:, heads.start : heads.stop],
        )
        for slot, part in enumerate(parts)
    )
    named = sorted(block for part in parts for block in part.block_ids)
    right = torch.equal(before[:, named], after[:, named])
    untouched = not bool(after[:, len(named) :].any())
    place.clear()
    return pages_right and right and untouched


def order(place: Place) -> Finding:
    """Kernels write, a dump and a fence follow, kernels overwrite, other pages are loaded."""
    if not place.is_asynchronous:
        return Finding(SKIPPED, "the CPU has no streams")
    wrong = rounds = 0
    for layout in ("LBHNC", "LBNHC"):
        for pinned in ("all", "none"):
            rank = place.rank(layout, SMALL, num_blocks=_PAGES, seed=1)
            arena = place.arena(2 * _PAGES, SMALL, pinned=pinned)
            wrong += _wrong_rounds(place, rank, arena)
            rounds += _ROUNDS
            place.clear()
    return Finding(BAD if wrong else GOOD, f"{rounds} rounds under load, {wrong} of them wrong")


def _wrong_rounds(place: Place, rank: Rank, arena: Arena) -> int:
    engine = place.engine(rank)
    dumped, loaded = whole(rank, _PAGES), whole(rank, _PAGES, first_slot=_PAGES)
    wrong = 0
    for value in range(1, _ROUNDS + 1):
        for slot in range(_PAGES, 2 * _PAGES):
            page_in(arena, SMALL, slot).fill_(100 + value)
        place.busy()
        place.write(rank, value)
        engine.order_after_forward()
        engine.submit(value, DUMP, dumped, arena)
        engine.fence([value])
        place.write(rank, -value)
        engine.order_before_forward()
        engine.submit(100 + value, LOAD, loaded, arena)
        wait_for(engine, value, 100 + value)
        place.synchronize()
        pages = [page_in(arena, SMALL, slot) for slot in range(_PAGES)]
        right = all(bool((page == value).all()) for page in pages)
        wrong += not (right and bool((rank.cache.read() == 100 + value).all()))
    return wrong


def bandwidth(place: Place) -> Finding:
    """GB/s of whole prompts beside one pinned copy: TP 1, 4 and 8 of a 70B model, two layouts."""
    num_pages = 32 if place.is_real else 1
    geometry = LARGE if place.is_real else SMALL
    rows, worst = [], 1.0
    for tp_size in (1, 4, 8) if place.is_real else (1, 4):
        share_bytes = num_pages * geometry.page_bytes // tp_size
        bus = _bus_gb_s(place, share_bytes)
        rows.append((f"TP {tp_size}: one pinned copy, load / dump", _pair(bus)))
        for layout, tokens in (("LBHNC", 128), ("LBNHC", 128), ("LBHNC", 16)):
            for batched in _batched_ways(place):
                speeds = _engine_gb_s(place, geometry, layout, tokens, tp_size, num_pages, batched)
                how = ", batched" if batched else ""
                rows.append((f"TP {tp_size}: {layout}, blocks of {tokens}{how}", _pair(speeds)))
                worst = min(worst, *(s / b for s, b in zip(speeds, bus, strict=True)))
    verdict = LOOK if place.is_real and worst < 0.5 else GOOD
    return Finding(verdict, f"the slowest copies have {worst:.0%} of the bus", rows)


def _batched_ways(place: Place) -> list[BatchedCopy | None]:
    ways: list[BatchedCopy | None] = [None]
    if place.is_real:
        with contextlib.suppress(ImportError):
            from ucm.integration.vllm.batched_copy import batched_copy

            ways += [found] if (found := batched_copy()) else []
    return ways


def _engine_gb_s(
    place: Place,
    geometry: PageGeometry,
    layout: str,
    tokens: int,
    tp_size: int,
    num_pages: int,
    batched: BatchedCopy | None,
) -> tuple[float, float]:
    rank = place.rank(
        layout,
        geometry,
        block_tokens=tokens,
        num_blocks=num_pages * 128 // tokens,
        tp=(0, tp_size),
    )
    accelerator = place.accelerator(batched=batched) if place.is_asynchronous else None
    engine = place.engine(rank, accelerator=accelerator)
    arena, parts = place.arena(num_pages, geometry), whole(rank, num_pages)
    nbytes = num_pages * geometry.page_bytes // tp_size
    load_s = seconds(lambda: run_job(engine, 1, LOAD, parts, arena), place)
    dump_s = seconds(lambda: run_job(engine, 2, DUMP, parts, arena), place)
    place.clear()
    return nbytes / load_s / 1e9, nbytes / dump_s / 1e9


def _bus_gb_s(place: Place, nbytes: int) -> tuple[float, float]:
    host = torch.ones(nbytes, dtype=torch.uint8, pin_memory=place.is_real)
    there = torch.ones(nbytes, dtype=torch.uint8, device=place.device)
    load_s = seconds(lambda: there.copy_(host, non_blocking=True), place)
    dump_s = seconds(lambda: host.copy_(there, non_blocking=True), place)
    return nbytes / load_s / 1e9, nbytes / dump_s / 1e9


def _pair(speeds: tuple[float, float]) -> str:
    return f"{speeds[0]:6.1f} / {speeds[1]:.1f} GB/s"


def launches(place: Place) -> Finding:
    """What goes through the door to the device for one page, by layout and TP."""
    if not place.is_asynchronous:
        return Finding(SKIPPED, "the CPU has no launches")
    rows, most = [], 0
    for layout, tokens in (("BLHNC", 128), ("LBHNC", 128), ("LBNHC", 128), ("LBHNC", 16)):
        for tp_size in (1, 4):
            counting = Counting(place.accelerator())
            rank = place.rank(
                layout,
                SMALL,
                block_tokens=tokens,
                num_blocks=_PAGES * 128 // tokens,
                tp=(0, tp_size),
            )
            engine, arena = place.engine(rank, accelerator=counting), place.arena(_PAGES, SMALL)
            run_job(engine, 1, LOAD, whole(rank, _PAGES), arena)
            counted = {n: c for n, c in counting.calls.items() if n in ("copy", "scatter")}
            most = max(most, -(-sum(counted.values()) // _PAGES))
            shown = ", ".join(f"{count / _PAGES:g} {name}" for name, count in counted.items())
            rows.append((f"{layout}, blocks of {tokens}, TP {tp_size}", shown))
            place.clear()
    return Finding(GOOD, f"at most {most} for a page of {SMALL.num_layers} layers", rows)


def memory(place: Place) -> Finding:
    """Device memory that vLLM doesn't know of: when an engine is made, and after its copies."""
    if place.is_real and not hasattr(torch.accelerator, "get_memory_info"):
        return Finding(SKIPPED, "this torch does not say how much device memory is free")
    if not place.is_asynchronous:
        return Finding(SKIPPED, "the CPU has no memory of its own")
    geometry = LARGE if place.is_real else SMALL
    rank = place.rank("LBNHC", geometry, num_blocks=8)
    arena, parts = place.arena(8, geometry), whole(rank, 8)
    used = [_used_bytes(place)]
    engine = place.engine(rank)
    used.append(_used_bytes(place))
    for job, direction in enumerate((DUMP, LOAD, DUMP, LOAD)):
        run_job(engine, job, direction, parts, arena)
    used.append(_used_bytes(place))
    made, more = (after - before for before, after in itertools.pairwise(used))
    rows = [("made", f"{made / 2**20:.0f} MiB"), ("after copies", f"{more / 2**20:.0f} MiB more")]
    verdict = LOOK if made + more > 48 << 20 else GOOD
    return Finding(verdict, f"{(made + more) / 2**20:.0f} MiB; 32 are staging", rows)


def _used_bytes(place: Place) -> int:
    place.synchronize()
    if not place.is_real:
        return place.stand_in.used_bytes
    free, total = torch.accelerator.get_memory_info()
    return int(total - free)
