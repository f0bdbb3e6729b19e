"""What flags of the proxy cost it, in one run: CPU time per request, each way after the other.

As benchmarks/proxy.py, 32 clients, mock engines: 4 KB prompts that nobody has sent before, so what
is known and where it lies is looked up and noted each time and helps nobody.

    python benchmarks/proxy_flags.py [--repeats 5] [--requests 2000]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.proxy import NUM_WARM_UP, Samples, measure_load, start
from examples.cluster.processes import end_run

CLIENTS: Final = 32
WAYS: Final = {
    "no flags": (),
    "--affinity prefix": ("--affinity=prefix",),
    "and --known-for-s": ("--affinity=prefix", "--known-for-s=1000"),
    "--loop uvloop": ("--loop=uvloop",),
    "all three": ("--affinity=prefix", "--known-for-s=1000", "--loop=uvloop"),
}


def measure(*, repeats: int, requests: int) -> dict[str, Samples]:
    taken: dict[str, Samples] = {way: defaultdict(list) for way in WAYS}
    with ExitStack() as stack:
        benches = {way: start(stack, *flags) for way, flags in WAYS.items()}
        for bench in benches.values():
            bench.load(bench.proxy, clients=CLIENTS, requests=NUM_WARM_UP)
        for _ in range(repeats):
            for way, bench in benches.items():
                measure_load(bench, CLIENTS, requests, taken[way])
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2000, help="of one load")
    args = parser.parse_args()
    try:
        taken = measure(repeats=args.repeats, requests=args.requests)
    finally:
        end_run()
    table = Table(title=f"{args.repeats} repeats of {args.requests} requests, {CLIENTS} clients")
    for column in ("flags", "CPU ms a request", "least", "most", "requests/s"):
        table.add_column(column, justify="left" if column == "flags" else "right")
    for way, samples in taken.items():
        cpu_ms = samples[f"cpu {CLIENTS}"]
        shown = [f"{each:.3f}" for each in (statistics.median(cpu_ms), min(cpu_ms), max(cpu_ms))]
        table.add_row(way, *shown, f"{statistics.median(samples[f'rate {CLIENTS}']):.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
