"""What one page costs on its way from a file into a slot, by size, each step next to the other.

The same files, in turns: plain reads by as many threads, the tier alone (open, header, checksums),
and the node cache; wall time, and per page the CPU time of whoever reads. Of the node cache also
what of that is its event loop's, and context switches of its threads.

    python benchmarks/page_cost.py [--rounds 7] [--mebibytes 128] [--directory DIR] [--kib 256 1024]

CPU time holds on a busy machine; throughput doesn't.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import limits
from benchmarks.store import NUM_SETS, Bench, new_ids
from ucm.store.blocks.blockfile import HEADER_BYTES
from ucm.store.blocks.keys import Key
from ucm.store.tiers.build import build_tiers
from ucm.store.tiers.tier import ReadStatus, TierNamespace

# Pages per call of the tier, in bytes: as the node cache asks (`page_reads.py`).
_GROUP_BYTES = 2 << 20


@dataclass(frozen=True)
class Cost:
    """Of one set of pages."""

    wall_s: float
    cpu_s: float
    # Of it, by the event loop's thread.
    loop_s: float = 0.0
    switches: int = 0


def measured(call: Callable[[], object]) -> Cost:
    """By this process."""
    cpu_s, started_s = time.process_time(), time.perf_counter()
    call()
    return Cost(time.perf_counter() - started_s, time.process_time() - cpu_s)


def used_by(pid: int) -> tuple[float, float, int]:
    """CPU seconds of the threads of a process, and of its first; context switches."""
    nanoseconds = loop_ns = switches = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        used_ns = int((task / "schedstat").read_text().split()[0])
        nanoseconds += used_ns
        loop_ns += used_ns if int(task.name) == pid else 0
        for line in (task / "status").read_text().splitlines():
            if "ctxt_switches" in line:
                switches += int(line.split()[1])
    return nanoseconds / 1e9, loop_ns / 1e9, switches


def through_node(bench: Bench, ids: list[bytes]) -> Cost:
    before = used_by(bench.pid)
    started_s = time.perf_counter()
    reply = bench.load_into_slots(ids)
    wall_s = time.perf_counter() - started_s
    assert reply.from_files == len(ids), f"{reply.from_files} of {len(ids)} from files"
    cpu_s, loop_s, switches = used_by(bench.pid)
    return Cost(wall_s, cpu_s - before[0], loop_s - before[1], switches - before[2])


def by_tier(bench: Bench, ids: list[bytes], target: np.ndarray) -> Cost:
    (tier,) = build_tiers(bench.settings)
    namespace = TierNamespace(bench.fingerprint, bench.page_bytes, bench.manifest_json)
    tier.open_namespace(namespace)
    pages = target.reshape(len(ids), -1)
    keys = [Key(bench.key_of(each)) for each in ids]
    most = max(1, _GROUP_BYTES // bench.page_bytes)
    starts = range(0, len(ids), most)

    def read(number: int) -> None:
        group = slice(starts[number], starts[number] + most)
        memory = [page.data for page in pages[group]]
        reads = tier.read_all(namespace, keys[group], memory)
        assert all(each.status is ReadStatus.HIT for each in reads)

    threads = bench.settings.read_threads
    return measured(lambda: limits.with_threads(read, len(starts), threads))


def measure(bench: Bench, rounds: int) -> dict[str, list[Cost]]:
    nbytes = bench.page_bytes * bench.num_pages
    source, target = limits.memory(nbytes), limits.memory(nbytes)
    sets = [new_ids(bench.num_pages) for _ in range(NUM_SETS)]
    for ids in sets:
        bench.dump(ids, source)
        # At once: what is not written yet stays in memory.
        bench.store.flush()
    costs: dict[str, list[Cost]] = defaultdict(list)
    for i in range(rounds):
        # Of three sets that take turns, none is still in memory.
        ids = sets[i % NUM_SETS]
        files, threads = bench.files(ids), bench.settings.read_threads

        def plain(files: list[str] = files, threads: int = threads) -> None:
            limits.read_files_s(files, target, skip_bytes=HEADER_BYTES, num_threads=threads)

        costs["plain reads"].append(measured(plain))
        costs["tier alone"].append(by_tier(bench, ids, target))
        costs["node cache"].append(through_node(bench, ids))
    return costs


def add_rows(table: Table, bench: Bench, costs: dict[str, list[Cost]]) -> None:
    plain_s = statistics.median(cost.wall_s for cost in costs["plain reads"])
    for name, taken in costs.items():
        wall_s = statistics.median(cost.wall_s for cost in taken)
        cpu_s = statistics.median(cost.cpu_s for cost in taken)
        loop_s = statistics.median(cost.loop_s for cost in taken)
        switches = statistics.median(cost.switches for cost in taken) / bench.num_pages
        table.add_row(
            f"{bench.page_bytes >> 10} KiB",
            name,
            f"{bench.page_bytes * bench.num_pages / wall_s / 1e9:.2f} GB/s",
            f"{plain_s / wall_s:.0%}",
            f"{1000 * cpu_s / bench.num_pages:.3f} ms",
            f"{1000 * loop_s / bench.num_pages:.3f} ms" if loop_s else "",
            f"{switches:.2f}" if switches else "",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mebibytes", type=int, default=128, help="size of one set of blocks")
    parser.add_argument("--directory", help="where to store; a temporary directory if not given")
    parser.add_argument("--kib", type=int, nargs="+", default=[256, 1024, 4096], help="of a page")
    args = parser.parse_args()
    table = Table(title=f"medians of {args.rounds} rounds, {args.mebibytes} MiB each")
    for column in ("pages", "by", "throughput", "of plain", "CPU per page", "its loop", "switches"):
        table.add_column(column)
    for kib in args.kib:
        page_bytes = kib << 10
        num_pages = (args.mebibytes << 20) // page_bytes
        directory = Path(tempfile.mkdtemp(prefix="ucm-bench-", dir=args.directory))
        bench = Bench(directory, page_bytes=page_bytes, num_pages=num_pages)
        try:
            add_rows(table, bench, measure(bench, args.rounds))
        finally:
            bench.close()
            shutil.rmtree(directory, ignore_errors=True)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
