"""What storing answers costs those that are being answered.

Engines of one kind: two without a connector, and UCM's with `store_generated` false, end and true,
each of these with a node cache and files of its own. They take turns, in another order each round,
while the others idle: some requests decode at once, and the time between their tokens is measured
while all of them do. The second engine without a connector says what differences mean nothing: it
is compared with the first as UCM's are. A block's gaps are those at which a request has filled one:
the pages of it are copied then.

    python benchmarks/answers.py [--rounds 6] [--new-tokens 600] [--streams 4] [--model small]
        [--only plain,true] [--directory DIR]

Aims are shown as reached or missed; a missed one is no error.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contenders import BLOCK_TOKENS, KV_BYTES_PER_TOKEN, prompt_of
from benchmarks.cpu_use import cpu_s
from benchmarks.rounds import quartiles, ratios
from benchmarks.streaming import stream
from examples.cluster.client import Answer, total
from examples.cluster.models import make_model
from examples.cluster.processes import (
    MIB,
    VllmServer,
    end_run,
    run_folder,
    ucm_connector,
)

PLAIN, CONTROL = "plain", "plain again"
OFF = "false"
STORED: dict[str, bool | str] = {OFF: False, "end": "end", "true": True}
NAMES = (PLAIN, CONTROL, *STORED)
AIM = 0.03
KV_CACHE_TOKENS = 16384
PROMPT_TOKENS = 100
# Of the tokens behind a full block, how many may wait for its copies.
BEHIND_BLOCK = 3
# vLLM's worker keeps a core busy for a second after each step.
SETTLE_S = 1.5


@dataclass
class Round:
    """Milliseconds between tokens while all streams decode, and of these behind a full block; and
    milliseconds of CPU for each token, by process."""

    gaps_ms: list[float]
    at_blocks_ms: list[float]
    cpu_ms: dict[str, float]

    @property
    def mean_ms(self) -> float:
        return statistics.fmean(self.gaps_ms)

    @property
    def computing_ms(self) -> float:
        return self.cpu_ms["worker"] + self.cpu_ms["engine"]


@dataclass
class Found:
    rounds: defaultdict[str, list[Round]] = field(default_factory=lambda: defaultdict(list))
    dumped_mib: dict[str, float] = field(default_factory=dict)


def measure(servers: Mapping[str, VllmServer], args: argparse.Namespace) -> Found:
    found, rng = Found(), random.Random(args.seed)
    names = list(servers)
    for name in names:
        _round(servers[name], args, rng)  # warms up
    for number in range(args.rounds):
        shift = number // 2 % len(names)
        order = names[shift:] + names[:shift]
        for name in order if number % 2 else reversed(order):
            found.rounds[name].append(_round(servers[name], args, rng))
    for name in names:
        samples = servers[name].client.metrics()
        found.dumped_mib[name] = total(samples, "ucm_dumped_bytes_total") / MIB
    return found


def _round(server: VllmServer, args: argparse.Namespace, rng: random.Random) -> Round:
    time.sleep(SETTLE_S)
    prompts = [prompt_of(PROMPT_TOKENS, rng) for _ in range(args.streams)]
    before = cpu_s(server)
    with ThreadPoolExecutor(len(prompts)) as pool:
        ask = partial(stream, server.client, max_tokens=args.new_tokens)
        answers = list(pool.map(ask, prompts))
    # With what is written after the answers have ended, and with what the worker spins.
    time.sleep(SETTLE_S)
    after = cpu_s(server)
    num_tokens = args.streams * args.new_tokens
    spent = {part: 1000 * (after[part] - before[part]) / num_tokens for part in after}
    gaps = list(_gaps(answers))
    at_blocks = [ms for token, ms in gaps if (PROMPT_TOKENS + token) % BLOCK_TOKENS < BEHIND_BLOCK]
    return Round([ms for _, ms in gaps], at_blocks, spent)


def _gaps(answers: Sequence[Answer]) -> Iterator[tuple[int, float]]:
    """Which token of an answer ends it, and its length, while all answers are under way."""
    begin_s = max(each.arrived_s[0] for each in answers)
    end_s = min(each.arrived_s[-1] for each in answers)
    for each in answers:
        for token, (a, b) in enumerate(pairwise(each.arrived_s), start=1):
            if begin_s < a and b <= end_s:
                yield token, 1000 * (b - a)


def show(console: Console, found: Found) -> None:
    table = Table(title="ms between tokens; of ratios to plain, round by round, the quartiles")
    for column in ("store_generated", "mean", "to plain", "p50", "p99", "max"):
        table.add_column(column)
    for column in ("p50 behind a block", "CPU ms per token", "worker + engine, to plain"):
        table.add_column(column)
    plain = found.rounds[PLAIN]
    for name, rounds in found.rounds.items():
        gaps = [ms for each in rounds for ms in each.gaps_ms]
        at_blocks = [ms for each in rounds for ms in each.at_blocks_ms]
        parts = rounds[0].cpu_ms
        spent = {p: statistics.median(each.cpu_ms[p] for each in rounds) for p in parts}
        table.add_row(
            name,
            f"{statistics.fmean(gaps):.2f}",
            quartiles(ratios(_means(rounds), _means(plain))),
            f"{np.percentile(gaps, 50):.2f}",
            f"{np.percentile(gaps, 99):.2f}",
            f"{max(gaps):.1f}",
            f"{np.percentile(at_blocks, 50):.2f}" if at_blocks else "",
            ", ".join(f"{part} {ms:.2f}" for part, ms in spent.items()),
            quartiles(ratios(_computing(rounds), _computing(plain))),
        )
    console.print(table)
    console.print(f"MiB dumped: {found.dumped_mib}", highlight=False)
    for aim, ratio in aims(found):
        verdict = "[green]reached[/green]" if ratio <= 1 + AIM else "[red]missed[/red]"
        console.print(f"{verdict}  {aim}: at most {1 + AIM}: {ratio:.3f}", highlight=False)


def _means(rounds: Sequence[Round]) -> list[float]:
    return [each.mean_ms for each in rounds]


def _computing(rounds: Sequence[Round]) -> list[float]:
    return [each.computing_ms for each in rounds]


def aims(found: Found) -> Iterator[tuple[str, float]]:
    """Times between tokens: of engines with UCM to one without, and where answers are stored to
    where they are not."""
    for base, names in ((PLAIN, STORED), (OFF, [name for name in STORED if name != OFF])):
        to = found.rounds.get(base, [])
        for name in sorted(found.rounds.keys() & names) if to else ():
            of = found.rounds[name]
            ratio = statistics.median(ratios(_means(of), _means(to)))
            yield f"{name} to {base}", ratio


def started(model: Path, name: str, folder: Path, args: argparse.Namespace) -> VllmServer:
    label = name.replace(" ", "-")
    kv_transfer = None
    if name in STORED:
        store: dict[str, Any] = {
            "store_pipeline": "Cache|Posix",
            "storage_backends": str(folder / label),
            "cache_buffer_capacity_gb": 0.5,
            "node_cache_socket": str(run_folder() / f"answers-{label}.sock"),
        }
        entry = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": store}
        tree = {"ucm_connectors": [entry], "store_generated": STORED[name]}
        kv_transfer = ucm_connector(tree)
    return VllmServer(
        model,
        kv_transfer=kv_transfer,
        log=folder / f"{label}.log",
        dtype="bfloat16",
        kv_cache_bytes=max(KV_CACHE_TOKENS * KV_BYTES_PER_TOKEN[args.model], 64 * MIB),
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=600, help="of an answer")
    parser.add_argument("--streams", type=int, default=4, help="that decode at once")
    parser.add_argument("--model", choices=KV_BYTES_PER_TOKEN, default="small")
    parser.add_argument("--only", default=",".join(NAMES), help="separated by commas, plain first")
    parser.add_argument("--directory", type=Path, help="where files go; else where tempfiles do")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.only = args.only.split(",")
    if not set(args.only) <= set(NAMES) or args.only[0] != PLAIN:
        parser.error(f"--only: {PLAIN}, then others of {', '.join(NAMES)}")
    return args


def main() -> None:
    args = arguments()
    console = Console(width=max(Console().width, 160))
    folder = Path(tempfile.mkdtemp(prefix="ucm-answers-", dir=args.directory))
    page_mib = BLOCK_TOKENS * KV_BYTES_PER_TOKEN[args.model] / MIB
    console.print(
        f"model {args.model}, bfloat16, a block of {BLOCK_TOKENS} tokens has {page_mib:g} MiB; "
        f"{args.rounds} rounds of {args.streams} x {args.new_tokens} tokens"
    )
    try:
        model = make_model(folder / "model", size=args.model)
        with ExitStack() as stack:
            servers = {
                name: stack.enter_context(started(model, name, folder, args)) for name in args.only
            }
            for each in servers.values():
                each.wait_ready()
            found = measure(servers, args)
    finally:
        end_run()
        shutil.rmtree(folder, ignore_errors=True)
    show(console, found)


if __name__ == "__main__":
    main()
