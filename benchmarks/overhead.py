"""What a store costs an engine that finds nothing in it.

Three engines of one kind, one of them with UCM (a node cache, and files below it) and two without a
connector; all prompts are new to all. They take turns, in another order each round, while the
others idle. A round is one stretch as fast as it goes, `--at-once` requests at a time, and one in
which requests come at a pace. The second engine without a connector says what differences mean
nothing: it is compared with the first as UCM's is.

    python benchmarks/overhead.py [--rounds 6] [--requests 24] [--tokens 1500] [--new-tokens 32]
        [--at-once 4] [--share 0.6] [--model small] [--directory DIR]

Aims are shown as reached or missed; a missed one is no error.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contenders import BLOCK_TOKENS, KV_BYTES_PER_TOKEN, WHOLE_TOKENS, prompt_of
from benchmarks.cpu_use import cpu_s
from benchmarks.rounds import quartiles, ratios
from benchmarks.streaming import stream
from examples.cluster.client import Answer
from examples.cluster.models import make_model
from examples.cluster.processes import (
    MIB,
    VllmServer,
    end_run,
    run_folder,
    ucm_connector,
)

PLAIN, CONTROL, UCM = "plain", "plain again", "ucm"
NAMES = (PLAIN, CONTROL, UCM)
AIM = 0.03
KV_CACHE_TOKENS = 16384
# For what an answer leaves to be written.
SETTLE_S = 1.0


@dataclass
class Stretch:
    """What one engine did in one stretch of a round."""

    answers: Sequence[Answer]
    seconds: float

    @property
    def per_s(self) -> float:
        return len(self.answers) / self.seconds

    @property
    def ttft_ms(self) -> float:
        return statistics.median(each.ttft_s for each in self.answers) * 1000


@dataclass
class Found:
    """By engine: its stretches in the order of rounds, and seconds of CPU by kind of process."""

    full: defaultdict[str, list[Stretch]] = field(default_factory=lambda: defaultdict(list))
    paced: defaultdict[str, list[Stretch]] = field(default_factory=lambda: defaultdict(list))
    cpu_s: defaultdict[str, dict[str, float]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(float))
    )


class Bench:
    def __init__(self, servers: Mapping[str, VllmServer], args: argparse.Namespace) -> None:
        self._servers = servers
        self._args = args
        self._rng = random.Random(args.seed)
        self._per_s = 0.0

    def measure(self) -> Found:
        for server in self._servers.values():
            self._full(server)
        paces = [self._full(self._servers[PLAIN]).per_s for _ in range(2)]
        self._per_s = min(paces) * self._args.share
        found = Found()
        for number in range(self._args.rounds):
            # Each is the first, the last and between equally often.
            shift = number % len(NAMES)
            names = NAMES[shift:] + NAMES[:shift]
            for name in names if number % 2 else reversed(names):
                self._round(name, found)
        return found

    def _round(self, name: str, found: Found) -> None:
        server = self._servers[name]
        before = cpu_s(server)
        found.full[name].append(self._full(server))
        found.paced[name].append(self._paced(server))
        time.sleep(SETTLE_S)
        for kind, spent in cpu_s(server).items():
            found.cpu_s[name][kind] += spent - before.get(kind, 0.0)

    def _ask(self, server: VllmServer) -> Callable[[], Answer]:
        prompt = prompt_of(self._args.tokens, self._rng)
        return lambda: stream(server.client, prompt, max_tokens=self._args.new_tokens)

    def _full(self, server: VllmServer) -> Stretch:
        asks = [self._ask(server) for _ in range(self._args.requests)]
        began_s = time.monotonic()
        with ThreadPoolExecutor(self._args.at_once) as pool:
            answers = list(pool.map(lambda ask: ask(), asks))
        return Stretch(answers, time.monotonic() - began_s)

    def _paced(self, server: VllmServer) -> Stretch:
        """At equal distances: chance would be one more difference."""
        asks = [self._ask(server) for _ in range(self._args.requests)]
        began_s = time.monotonic()
        turn, lock = count(), threading.Lock()

        def one(ask: Callable[[], Answer]) -> Answer:
            with lock:
                at_s = began_s + next(turn) / self._per_s
            time.sleep(max(0.0, at_s - time.monotonic()))
            return ask()

        with ThreadPoolExecutor(len(asks)) as pool:
            answers = list(pool.map(one, asks))
        return Stretch(answers, time.monotonic() - began_s)


def show(console: Console, found: Found, args: argparse.Namespace) -> None:
    table = Table(title="by rounds: medians, and of ratios to plain the quartiles")
    for column in ("engine", "req/s", "to plain", "TTFT ms at a pace", "to plain"):
        table.add_column(column)
    for column in ("TTFT ms in full", "CPU s per request"):
        table.add_column(column)
    verdicts = []
    for name in NAMES:
        rates = [each.per_s for each in found.full[name]]
        times = [each.ttft_ms for each in found.paced[name]]
        rate = ratios(rates, [each.per_s for each in found.full[PLAIN]])
        ttft = ratios(times, [each.ttft_ms for each in found.paced[PLAIN]])
        requests = 2 * args.requests * args.rounds
        spent = ", ".join(f"{kind} {s / requests:.3f}" for kind, s in found.cpu_s[name].items())
        full = statistics.median(each.ttft_ms for each in found.full[name])
        table.add_row(
            name,
            f"{statistics.median(rates):.2f}",
            quartiles(rate),
            f"{statistics.median(times):.0f}",
            quartiles(ttft),
            f"{full:.0f}",
            spent,
        )
        if name == UCM:
            rate_now, ttft_now = statistics.median(rate), statistics.median(ttft)
            verdicts = [
                ("requests per second at least", 1 - AIM, rate_now, rate_now >= 1 - AIM),
                ("TTFT at a pace at most", 1 + AIM, ttft_now, ttft_now <= 1 + AIM),
            ]
    console.print(table)
    for aim, bound, value, is_reached in verdicts:
        verdict = "[green]reached[/green]" if is_reached else "[red]missed[/red]"
        console.print(f"{verdict}  {aim} {bound} of plain's: {value:.3f}", highlight=False)


def server(model: Path, name: str, store: Path, args: argparse.Namespace) -> VllmServer:
    settings: dict[str, Any] = {
        "store_pipeline": "Cache|Posix",
        "storage_backends": str(store),
        "cache_buffer_capacity_gb": 1,
        "node_cache_socket": str(run_folder() / "overhead.sock"),
    }
    entry = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": settings}
    kv_transfer = ucm_connector({"ucm_connectors": [entry]}) if name == UCM else None
    return VllmServer(
        model,
        kv_transfer=kv_transfer,
        log=store / f"{name}.log".replace(" ", "-"),
        dtype="bfloat16",
        kv_cache_bytes=max(KV_CACHE_TOKENS * KV_BYTES_PER_TOKEN[args.model], 64 * MIB),
        args=["--max-num-batched-tokens", str(WHOLE_TOKENS)],
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--requests", type=int, default=24, help="of each stretch")
    parser.add_argument("--tokens", type=int, default=1500, help="of a prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--at-once", type=int, default=4, help="requests, as fast as it goes")
    parser.add_argument("--share", type=float, default=0.6, help="of that, at a pace")
    parser.add_argument("--model", choices=KV_BYTES_PER_TOKEN, default="small")
    parser.add_argument("--directory", type=Path, help="where files go; else where tempfiles do")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    console = Console(width=max(Console().width, 140))
    store = Path(tempfile.mkdtemp(prefix="ucm-overhead-", dir=args.directory))
    console.print(
        f"model {args.model}, bfloat16, blocks of {BLOCK_TOKENS} tokens; {args.rounds} rounds of "
        f"2 x {args.requests} requests of {args.tokens} new tokens, {args.new_tokens} answered"
    )
    try:
        model = make_model(store / "model", size=args.model)
        with ExitStack() as stack:
            servers = {
                name: stack.enter_context(server(model, name, store, args)) for name in NAMES
            }
            for each in servers.values():
                each.wait_ready()
            found = Bench(servers, args).measure()
            hits = servers[UCM].client.counters().external_hits
            console.print(f"{hits} tokens were hits")
    finally:
        end_run()
        shutil.rmtree(store, ignore_errors=True)
    show(console, found, args)


if __name__ == "__main__":
    main()
