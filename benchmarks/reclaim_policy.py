"""Which pages a store that is full had better keep: reclaim's policy on recorded requests.

Replays traces of real requests on a simulated clock, for stores of some shares of all bytes that
the trace writes, and prints the share of blocks that are hits (a hit ends at the first block of a
prompt that is missing). Ours is the code of score.py and recall.py; beside it:

* LRU and FIFO, which give up one block at a time, of a prompt the end first.
* "as reclaim runs": with reclaim_plan.py, a tenth of the store at once and of pools of files.
* The optimum, which knows the future (Belady): of all blocks it keeps those that are asked for
  soonest, of equal ones the earlier in the prompt. A block is never asked for without those before
  it, so what it keeps has no gaps, and no policy has more hits.

The traces are those of Mooncake (github.com/kvcache-ai/Mooncake, in FAST25-release/traces):

    python benchmarks/reclaim_policy.py --trace conversation_trace.jsonl synthetic_trace.jsonl

    [--capacities 1 2 5 10 20 50 100] [--part all|first|second] [--rate 1] [--nodes 1]

One JSON object a line: `timestamp` in ms, `input_length` in tokens, and `hash_ids`, one for each
512 tokens, equal for equal prefixes; a last one that isn't full is a tail. `--rate 10` lets
requests come ten times as fast; `--nodes 4` spreads them at random over nodes that don't know of
each other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.request_trace import Trace, read_trace
from benchmarks.stores import Kept, ReclaimedKept, fifo, lru, optimum, ours

AS_RUN: Final = ", as reclaim runs"
POLICIES: Final = ("FIFO", "LRU", f"LRU{AS_RUN}", "ours", f"ours{AS_RUN}", "optimum")


def main() -> None:
    args = _arguments()
    for path in args.trace:
        trace = read_trace(path, part=args.part, rate=args.rate)
        replay = partial(_replays, trace, args.nodes)
        sizes = [max(1, trace.num_keys * percent // 100) for percent in args.capacities]
        shares = {name: [replay(name, size) for size in sizes] for name in POLICIES}
        _show(path.name, trace, args.capacities, shares)


def _replays(trace: Trace, num_nodes: int, name: str, capacity: int) -> float:
    kept = ReclaimedKept() if name.endswith(AS_RUN) else Kept()
    if name.startswith("ours"):
        return ours(trace, capacity, kept, num_nodes=num_nodes)
    policy = {"FIFO": fifo, "LRU": lru, "optimum": optimum}[name.removesuffix(AS_RUN)]
    return policy(trace, capacity, kept)


def _show(
    name: str, trace: Trace, capacities: Sequence[int], shares: dict[str, list[float]]
) -> None:
    title = (
        f"{name}: {len(trace.requests)} requests in {trace.seconds:.0f} s, {trace.num_blocks} "
        f"blocks, {trace.num_keys} different ones; share of blocks that are hits"
    )
    table = Table(title=title)
    table.add_column("capacity, % of all bytes")
    for percent in capacities:
        table.add_column(f"{percent}", justify="right")
    table.add_column("way from LRU to the optimum", justify="right")
    low, high = sum(shares["LRU"]), sum(shares["optimum"])
    for policy, found in shares.items():
        way = f"{(sum(found) - low) / (high - low):.0%}" if high > low else "-"
        table.add_row(policy, *(f"{share:.3f}" for share in found), way)
    Console(width=140).print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--capacities", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50, 100])
    parser.add_argument("--part", choices=("all", "first", "second"), default="all")
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--nodes", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
