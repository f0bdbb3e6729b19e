"""What a hit costs whose files are slower than computing it (`load_policy`).

A prefill server stores some prompts. Then decode servers are asked, by turns, for one that is new
(a miss) and one that is stored, and the time to the first token of both is compared:

- files that take ten times as long to read as the prompt takes to compute (a FUSE mount whose reads
  are delayed; needs root), `load_policy: auto` and `always`
- the same files as they are, `auto`

Before it is timed, `auto` sees a few prompts of each kind: that is how it learns.

    python benchmarks/load_worth.py [--repeats 5] [--tokens 3500] [--model mid] [--slower 10]

The aim, 1.1 times a miss at most, is shown as reached or missed; a missed one is no error.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.contenders import BLOCK_TOKENS, KV_BYTES_PER_TOKEN, WHOLE_TOKENS, prompt_of
from benchmarks.streaming import stream
from examples.cluster.client import Client, by_label
from examples.cluster.models import make_model
from examples.cluster.processes import VllmServer, end_run, run_folder, ucm_connector

RATIO_AIM = 1.1
MAX_TOKENS = 4
NUM_LEARNT = 4
READ_THREADS = 8
PAUSE_S = 0.3
PROBE_DELAY_S = 0.01


@dataclass
class Case:
    """`refused`: blocks of the stored prompts that were not worth their load."""

    name: str
    policy: str
    miss_s: list[float] = field(default_factory=list)
    hit_s: list[float] = field(default_factory=list)
    loaded_tokens: int = 0
    refused: int = 0
    are_right: bool = True


class Bench:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args = args
        self._folder = folder
        self._rng = random.Random(1)
        self._model = make_model(folder / "model", args.model)
        self.store = folder / "store"
        self.store.mkdir()
        self.stored: list[tuple[list[int], tuple[int, ...]]] = []
        self.miss_s = 0.0

    @contextmanager
    def server(
        self, name: str, backend: Path, *, role: str, policy: str = "auto"
    ) -> Iterator[Client]:
        settings: dict[str, Any] = {
            "storage_backends": str(backend),
            "cache_buffer_capacity_gb": 2,
            "min_free_gb": 0,
            "posix_read_threads": READ_THREADS,
            "node_cache_idle_exit_s": 2,
            "node_cache_socket": str(run_folder() / f"{name}.sock"),
        }
        entry = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": settings}
        tree = {"ucm_connectors": [entry], "load_policy": policy}
        with VllmServer(
            self._model,
            log=self._folder / f"{name}.log",
            kv_transfer=ucm_connector(tree, kv_role=role),
            dtype="bfloat16",
            kv_cache_bytes=2 * WHOLE_TOKENS * KV_BYTES_PER_TOKEN[self._args.model],
            args=["--max-num-batched-tokens", str(WHOLE_TOKENS), "--no-enable-prefix-caching"],
        ) as server:
            server.wait_ready()
            yield server.client

    def fresh(self) -> list[int]:
        return prompt_of(self._args.tokens, self._rng)

    def fill(self) -> None:
        """The prompts that are stored, what is right for them, and how long one takes."""
        with self.server("prefill", self.store, role="kv_producer") as client:
            stream(client, self.fresh(), max_tokens=MAX_TOKENS)
            times_s = []
            for _ in range(NUM_LEARNT + self._args.repeats):
                prompt = self.fresh()
                answer = stream(client, prompt, max_tokens=MAX_TOKENS)
                times_s.append(answer.ttft_s)
                self.stored.append((prompt, tuple(answer.token_ids)))
                time.sleep(PAUSE_S)
            time.sleep(3)  # for the last writes
        self.miss_s = statistics.median(times_s)

    def delay_s(self) -> float:
        """Of each read, so that a stored prompt takes as many times longer as is asked for."""
        from tests.faults.fuse import mount_fuse

        blocks = sorted(self.store.glob("*/??/??/*.kv"))
        mounted = self._folder / "probe"
        with mount_fuse(self.store, mounted, delays_s={"read": PROBE_DELAY_S}) as mount:
            (mounted / blocks[0].relative_to(self.store)).read_bytes()
            num_reads = mount.calls["read"]
        num_blocks = self._args.tokens // BLOCK_TOKENS
        return self._args.slower * self.miss_s * READ_THREADS / (num_blocks * num_reads)

    def measure(self, name: str, backend: Path, policy: str) -> Case:
        case = Case(name, policy)
        learnt, timed = self.stored[:NUM_LEARNT], self.stored[NUM_LEARNT:]
        with self.server(f"{name}-{policy}", backend, role="kv_consumer", policy=policy) as client:
            for prompt, _ in learnt:
                stream(client, self.fresh(), max_tokens=MAX_TOKENS)
                stream(client, prompt, max_tokens=MAX_TOKENS)
            before = client.metrics()
            for prompt, right in timed:
                time.sleep(PAUSE_S)
                case.miss_s.append(stream(client, self.fresh(), max_tokens=MAX_TOKENS).ttft_s)
                time.sleep(PAUSE_S)
                hit = stream(client, prompt, max_tokens=MAX_TOKENS)
                case.hit_s.append(hit.ttft_s)
                # In bfloat16 tokens may differ where a prompt is cut otherwise; it is told apart.
                case.are_right &= tuple(hit.token_ids) == right
            time.sleep(1)
            after = client.metrics()
        case.refused = _grown(
            before, after, "ucm_lookup_missed_blocks_total", "reason", "not_worth"
        )
        for source in ("memory", "files"):
            case.loaded_tokens += _grown(before, after, "ucm_hit_tokens_total", "source", source)
        return case


def _grown(
    before: dict[str, float], after: dict[str, float], name: str, label: str, value: str
) -> int:
    return by_label(after, name, label)[value] - by_label(before, name, label)[value]


def show(console: Console, cases: list[Case], *, delay_s: float, tokens: int) -> None:
    console.print(
        f"prompts of {tokens} tokens; slow files: {delay_s * 1000:.0f} ms more for each read"
    )
    table = Table()
    for column in (
        *("files", "load_policy", "TTFT of a miss, ms", "of a stored prompt, ms", "ratio"),
        *("tokens loaded", "blocks refused", "same tokens", "aim"),
    ):
        table.add_column(column)
    for case in cases:
        miss_s, hit_s = statistics.median(case.miss_s), statistics.median(case.hit_s)
        ratio = hit_s / miss_s
        aim = "" if case.policy == "always" else "reached" if ratio <= RATIO_AIM else "missed"
        table.add_row(
            *(case.name, case.policy, _spread(case.miss_s), _spread(case.hit_s), f"{ratio:.2f}"),
            *(str(case.loaded_tokens), str(case.refused), str(case.are_right), aim),
        )
    console.print(table)


def _spread(times_s: list[float]) -> str:
    low, middle, high = (
        1000 * value for value in (min(times_s), statistics.median(times_s), max(times_s))
    )
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def run(args: argparse.Namespace, folder: Path, console: Console) -> None:
    from tests.faults.fuse import mount_fuse

    bench = Bench(args, folder)
    bench.fill()
    delay_s = bench.delay_s()
    cases = [bench.measure("fast", bench.store, "auto")]
    with ExitStack() as stack:
        slow = folder / "slow"
        stack.enter_context(mount_fuse(bench.store, slow, delays_s={"read": delay_s}))
        for policy in ("auto", "always"):
            cases.append(bench.measure("slow", slow, policy))
            end_run()
    show(console, cases, delay_s=delay_s, tokens=args.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=3500)
    parser.add_argument("--model", choices=sorted(KV_BYTES_PER_TOKEN), default="mid")
    parser.add_argument("--slower", type=float, default=10.0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ucm-worth-"))
    try:
        run(args, folder, Console(width=160))
    finally:
        end_run()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
