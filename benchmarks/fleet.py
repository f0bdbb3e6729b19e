"""What a fleet of N nodes asks of one filesystem, and what gives way first.

A model in virtual time, driven by recorded requests. The decisions are those of the product: each
node runs a real node cache without threads (lookups, promised pages, writes in order, touches), the
proxy's pool chooses instances, reclaim's plan chooses what goes. Modelled are the engines (so many
tokens a second, one prompt after the other), one metadata server (operations a second, latency) and
the data servers (bytes a second, latency).

    python benchmarks/fleet.py --trace conversation_trace.jsonl

    [--nodes 4 40 400 4000] [--requests 1500] [--rate 0.1] [--simulated 20] [--keeps 30]
    [--metadata-per-s 50000] [--data-gb-per-s 200] [--exact] [--affinity prefix]

Half of the nodes prefill, half decode. `--rate` is requests a second for each node. No more than
`--simulated` nodes are run: a larger fleet is so many copies of these that know nothing of each
other's prompts, and the servers are as much slower for one copy. The store keeps `--keeps` percent
of what the trace writes. A quarter of the requests warms up and isn't counted. With `--exact`
every page is asked for by itself, as files were before; `--affinity` is the proxy's flag.

Traces are as for reclaim_policy.py: those of Mooncake (github.com/kvcache-ai/Mooncake, in
FAST25-release/traces).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fleet_run import Fleet, FleetSizes, Outcome
from benchmarks.fleet_world import KINDS
from benchmarks.request_trace import read_trace

_PUBLISHED: Final = "github.com/kvcache-ai/Mooncake, in FAST25-release/traces"


def main() -> None:
    args = _arguments()
    if not args.trace.is_file():
        sys.exit(f"{args.trace}: there is no such file; traces are published at {_PUBLISHED}")
    trace = read_trace(args.trace)
    outcomes = []
    for num_nodes in args.nodes:
        sizes = FleetSizes(
            num_nodes=num_nodes,
            num_simulated=min(num_nodes, args.simulated),
            num_requests=args.requests,
            rate_per_s=args.rate,
            keeps=args.keeps / 100,
            metadata_per_s=args.metadata_per_s,
            data_bytes_per_s=args.data_gb_per_s * 1e9,
            is_exact=args.exact,
            affinity=args.affinity,
        )
        outcomes.append(asyncio.run(_run(Fleet(trace.requests, sizes))))
    _show(args, outcomes)


async def _run(fleet: Fleet) -> Outcome:
    """The proxy's pool wants a loop; nothing of it is waited for."""
    return fleet.run()


def _show(args: argparse.Namespace, outcomes: list[Outcome]) -> None:
    title = (
        f"{args.trace.name}: {args.rate:g} requests/s a node; metadata {args.metadata_per_s:g}/s, "
        f"data {args.data_gb_per_s:g} GB/s"
    )
    table = Table(title=title)
    table.add_column("nodes")
    for outcome in outcomes:
        sizes = outcome.sizes
        sampled = f" ({sizes.num_simulated} run)" if sizes.copies > 1 else ""
        table.add_column(f"{sizes.num_nodes}{sampled}", justify="right")
    rows = {
        "requests/s": [f"{each.requests_per_s:.1f}" for each in outcomes],
        "blocks a prompt, hit": [f"{each.blocks:.1f}, {each.hit_share:.0%}" for each in outcomes],
        "metadata operations/s": [f"{each.operations_per_s:.0f}" for each in outcomes],
        "a request": [f"{each.operations:.1f}" for each in outcomes],
    }
    for kind in KINDS:
        rows[f"  {kind}"] = [f"{each.by_kind[kind]:.2f}" for each in outcomes]
    rows |= {
        "GB/s": [f"{each.bytes_per_s / 1e9:.2f}" for each in outcomes],
        "TTFT p50, s": [f"{each.ttft_s(0.5):.2f}" for each in outcomes],
        "TTFT p99, s": [f"{each.ttft_s(0.99):.2f}" for each in outcomes],
        "unanswered": [str(each.num_unanswered) for each in outcomes],
        "used, metadata": [f"{each.used['metadata server']:.1%}" for each in outcomes],
        "used, data": [f"{each.used['data servers']:.1%}" for each in outcomes],
        "used, engines": [f"{each.used['engines']:.1%}" for each in outcomes],
        "first bottleneck": [each.bottleneck for each in outcomes],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console(width=140).print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE")
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 40, 400, 4000])
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--simulated", type=int, default=20)
    parser.add_argument("--keeps", type=float, default=30.0)
    parser.add_argument("--metadata-per-s", type=float, default=50_000.0)
    parser.add_argument("--data-gb-per-s", type=float, default=200.0)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--affinity", choices=("none", "prefix"), default="none")
    return parser.parse_args()


if __name__ == "__main__":
    main()
