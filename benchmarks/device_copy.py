"""How fast KV blocks travel between the device and the slots, in every layout.

    python benchmarks/device_copy.py [--tokens 3456] [--repeats 7]

Prints GB/s each way, medians, next to one large copy between the device and pinned memory: the most
that the bus gives. Needs torch only. Without an accelerator it measures the copies of CPU engines
next to one large plain copy.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from ucm.integration.copies.arena import Arena
from ucm.integration.copies.copy_engine import CopyEngine
from ucm.integration.copies.jobs import Direction, PagePart
from ucm.integration.copies.layout import KV, layer_view
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.copies.make import make_copy_engine
from ucm.integration.copies.target import CopyTarget
from ucm.store.blocks.page_layout import PageGeometry, rank_share

_BLOCK_TOKENS = 128


@dataclass(frozen=True)
class Model:
    """What shapes the pages. The CPU's is the mid model of the end-to-end benchmark."""

    name: str
    num_layers: int
    num_kv_heads: int
    head_size: int


_MODELS = {
    "cpu": Model("16 layers, 4 heads of 128", 16, 4, 128),
    "accelerator": Model("32 layers, 8 heads of 128", 32, 8, 128),
}


def stored(order: str, model: Model, num_blocks: int, device: torch.device) -> list[KV]:
    """All layers in one allocation, in an order of vLLM's: [B, H, N, K|V] per layer."""
    sizes = {
        "L": model.num_layers,
        "B": num_blocks,
        "H": model.num_kv_heads,
        "N": _BLOCK_TOKENS,
        "C": 2 * model.head_size,
    }
    memory = torch.zeros([sizes[name] for name in order], dtype=torch.bfloat16, device=device)
    memory.normal_()
    return list(memory.permute([order.index(name) for name in "LBHNC"]).unbind(0))


def apart(model: Model, num_blocks: int, device: torch.device) -> list[KV]:
    """K and V as tensors of their own: [B, N, H, d]."""
    shape = (num_blocks, _BLOCK_TOKENS, model.num_kv_heads, model.head_size)
    return [
        (
            torch.randn(shape, device=device).bfloat16(),
            torch.randn(shape, device=device).bfloat16(),
        )
        for _ in range(model.num_layers)
    ]


def layouts(
    model: Model, num_blocks: int, device: torch.device
) -> dict[str, Callable[[], tuple[list[KV], LayoutKind]]]:
    named: dict[str, Callable[[], tuple[list[KV], LayoutKind]]] = {
        "BLHNC (a page is one run)": lambda: (
            stored("BLHNC", model, num_blocks, device),
            LayoutKind.AS_SHAPED,
        ),
        "LBHNC (a layer is one run)": lambda: (
            stored("LBHNC", model, num_blocks, device),
            LayoutKind.AS_SHAPED,
        ),
        "LBNHC (tokens before heads)": lambda: (
            stored("LBNHC", model, num_blocks, device),
            LayoutKind.AS_SHAPED,
        ),
        "K and V apart": lambda: (apart(model, num_blocks, device), LayoutKind.AS_SHAPED),
    }
    if device.type == "cpu":
        named["CPU kernel (K transposed)"] = lambda: (
            stored("LBHNC", model, num_blocks, device),
            LayoutKind.CPU_VEC,
        )
    return named


def engine_of(layers: list[KV], kind: LayoutKind, geometry: PageGeometry) -> CopyEngine:
    share = rank_share(geometry, tp_rank=0, tp_size=1, layers=range(geometry.num_layers))
    views = [
        layer_view(
            kv,
            kind=kind,
            geometry=geometry,
            num_heads=geometry.num_kv_heads,
            block_tokens=_BLOCK_TOKENS,
        )
        for kv in layers
    ]
    return make_copy_engine([CopyTarget(views, geometry, share)])


def new_arena(nbytes: int, device: torch.device) -> Arena:
    fd = os.memfd_create("slots")
    os.ftruncate(fd, nbytes)
    arena = Arena(mmap.mmap(fd, nbytes), device=device)
    os.close(fd)
    arena.prepare(0, nbytes)
    return arena


def median_s(copy: Callable[[], None], repeats: int) -> float:
    copy()
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        copy()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def job_s(
    engine: CopyEngine,
    direction: Direction,
    parts: list[PagePart],
    arena: Arena,
    repeats: int,
) -> tuple[float, float]:
    """Seconds until a job has ended, and seconds that submitting it took of the rank's thread."""
    submits: list[float] = []

    def one() -> None:
        start = time.perf_counter()
        engine.submit(0, direction, parts, arena)
        submits.append(time.perf_counter() - start)
        while not engine.finished():
            time.sleep(0.0001)

    return median_s(one, repeats), statistics.median(submits)


def bus_s(nbytes: int, device: torch.device, repeats: int) -> dict[Direction, float]:
    """One copy of the same bytes, and nothing else."""
    on_accelerator = device.type != "cpu"
    host = torch.ones(nbytes, dtype=torch.uint8, pin_memory=on_accelerator)
    there = torch.ones(nbytes, dtype=torch.uint8, device=device)

    def copy(into: Tensor, out_of: Tensor) -> None:
        into.copy_(out_of, non_blocking=True)
        if on_accelerator:
            torch.accelerator.synchronize()

    return {
        Direction.LOAD: median_s(lambda: copy(there, host), repeats),
        Direction.DUMP: median_s(lambda: copy(host, there), repeats),
    }


def find_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        print("note: torch finds no accelerator here; these are the copies of a CPU engine\n")
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=27 * _BLOCK_TOKENS)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    device = find_device()
    model = _MODELS["cpu" if device.type == "cpu" else "accelerator"]
    num_pages = max(1, args.tokens // _BLOCK_TOKENS)
    geometry = PageGeometry(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        block_tokens=_BLOCK_TOKENS,
        k_size=model.head_size,
        v_size=model.head_size,
        item_bytes=2,
    )
    nbytes = num_pages * geometry.page_bytes
    print(
        f"{device}: {num_pages} pages of {geometry.page_bytes / 1e6:.1f} MB = {nbytes / 1e6:.0f} MB"
        f" ({model.name}, bfloat16), medians of {args.repeats}\n"
    )
    print(f"{'':30} {'load':>9} {'':>10} {'dump':>9} {'':>10} {'submit':>9}")
    bus = bus_s(nbytes, device, args.repeats)
    name = "one plain copy" if device.type == "cpu" else "one pinned copy"
    print_row(name, nbytes, bus[Direction.LOAD], bus[Direction.DUMP], None)

    arena = new_arena(num_pages * geometry.slot_bytes, device)
    num_blocks = num_pages + 5
    block_ids = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    parts = [PagePart(i * geometry.slot_bytes, 0, (block_ids[i],)) for i in range(num_pages)]
    for name, make in layouts(model, num_blocks, device).items():
        engine = engine_of(*make(), geometry)
        dump_s, _ = job_s(engine, Direction.DUMP, parts, arena, args.repeats)
        load_s, submit_s = job_s(engine, Direction.LOAD, parts, arena, args.repeats)
        engine.close()
        print_row(name, nbytes, load_s, dump_s, submit_s)
    arena.close()


def print_row(name: str, nbytes: int, load_s: float, dump_s: float, submit_s: float | None) -> None:
    columns = [
        f"{value}"
        for seconds in (load_s, dump_s)
        for value in (f"{nbytes / seconds / 1e9:.1f} GB/s", f"{seconds * 1e3:.1f} ms")
    ]
    submit = "" if submit_s is None else f"{submit_s * 1e6:.0f} us"
    first, second, third, fourth = columns
    print(f"{name:30} {first:>9} {second:>10} {third:>9} {fourth:>10} {submit:>9}", flush=True)


if __name__ == "__main__":
    main()
