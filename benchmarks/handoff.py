"""What a hand-off through a store costs, and what a hit in it costs those that decode beside it.

For each contender a prefill and a decode server are started, with a directory between them and a
proxy before them. All contenders in one run, page cache warm; then those of UCM with files that
take 5 ms longer each (a FUSE mount; needs root). The parts:

- latency: hand-off latency with `--handoff chain` and `overlap` (handoff_latency.py)
- race: of how many prompts decode loads all, asked at once (race.py)
- pace: the time between tokens of others while a hit loads (pace.py)
- hit: decode's TTFT on a store hit minus its TTFT on a local prefix hit; the prompt was prefilled
  a while ago and no proxy has a part in it. The yardstick is the bytes over the machine's memory
  bandwidth.

    python benchmarks/handoff.py [--repeats 5] [--tokens 1500 3500] [--only ucm-dram,fs]
        [--parts latency,race,pace,hit] [--model mid] [--slow-peers]

Each part has its model (MODEL_OF), or all have --model; those of one model share the servers.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import handoff_latency, pace, race
from benchmarks.contenders import (
    BLOCK_TOKENS,
    KV_BYTES_PER_TOKEN,
    SLOWER_S,
    Contender,
    Servers,
    contenders,
    left_out,
    prompt_of,
    running,
)
from examples.cluster.models import Size, make_model
from examples.cluster.processes import MIB

# A hit's bytes count beside what the engine itself does in a step: 113 MB of 3500 tokens with mid.
# The other parts compute many prompts, and small takes a second for one.
MODEL_OF: dict[str, Size] = {"latency": "small", "race": "small", "pace": "small", "hit": "mid"}
PARTS_WITH_SLOW_FILES = {"latency", "race"}
SETTLE_S = 1.5
NUM_WARM_UP = 3
MIN_WIDTH = 140


@dataclass(frozen=True)
class Sample:
    store_s: float
    local_s: float
    external_tokens: int
    same_tokens: bool


@dataclass
class Results:
    latency: list[handoff_latency.Group] = field(default_factory=list)
    races: list[race.Races] = field(default_factory=list)
    paces: list[pace.Pace] = field(default_factory=list)
    hits: list[tuple[Contender, list[Sample]]] = field(default_factory=list)


def measure(
    servers: Servers, parts: Sequence[str], args: argparse.Namespace, results: Results
) -> None:
    """Those of the parts that make sense for a contender."""
    if "latency" in parts:
        results.latency += handoff_latency.measure(
            servers, lengths=args.tokens, repeats=args.repeats
        )
    if "race" in parts:
        results.races += race.measure(servers, min(args.tokens))
    if servers.contender.is_slow:
        return  # the other parts are about files at their usual pace
    if "pace" in parts and servers.contender.is_ours:
        results.paces.append(
            pace.measure(
                servers, tokens=max(args.tokens), new_tokens=args.new_tokens, rounds=args.rounds
            )
        )
    if "hit" in parts:
        # The memory is touched already where prompts were handed over.
        num_warm_up = 0 if "latency" in parts else NUM_WARM_UP
        samples = measure_hits(servers, max(args.tokens), args.repeats, num_warm_up)
        results.hits.append((servers.contender, samples))


def measure_hits(servers: Servers, tokens: int, repeats: int, num_warm_up: int) -> list[Sample]:
    prefill, decode = servers.prefill.client, servers.decode.client
    rng = random.Random(0)
    samples = []
    for repeat in range(num_warm_up + repeats):
        prompt = prompt_of(tokens, rng)
        prefill.complete(prompt, max_tokens=1)
        time.sleep(SETTLE_S)
        before = decode.counters()
        hit = decode.complete(prompt, max_tokens=8)
        external = (decode.counters() - before).external_hits
        local = decode.complete(prompt, max_tokens=8)
        if repeat >= num_warm_up:
            same = hit.token_ids == local.token_ids
            samples.append(Sample(hit.ttft_s, local.ttft_s, external, same))
    return samples


def memory_bandwidth() -> float:
    """Bytes per second of one thread that copies memory."""
    source = np.ones(64 * MIB, dtype=np.uint8)
    target = np.empty_like(source)
    np.copyto(target, source)
    started_s = time.perf_counter()
    for _ in range(5):
        np.copyto(target, source)
    return 5 * source.nbytes / (time.perf_counter() - started_s)


def hits_table(hits: list[tuple[Contender, list[Sample]]], expected: int) -> Table:
    table = Table(title="decode's TTFT on a store hit, over its own prefix hit (ms, medians)")
    for column in ("contender", "store hit", "local hit", "overhead", "range", ""):
        table.add_column(column)
    for contender, samples in hits:
        table.add_row(*_hits_row(contender, samples, expected))
    return table


def _hits_row(contender: Contender, samples: list[Sample], expected: int) -> list[str]:
    overheads_ms = sorted((s.store_s - s.local_s) * 1000 for s in samples)
    note = "" if all(s.external_tokens == expected for s in samples) else "not all from the store"
    if not all(s.same_tokens for s in samples):
        note = f"{note} tokens differ from the local hit".strip()
    return [
        contender.name,
        f"{statistics.median(s.store_s for s in samples) * 1000:.0f}",
        f"{statistics.median(s.local_s for s in samples) * 1000:.0f}",
        f"{statistics.median(overheads_ms):.1f}",
        f"{overheads_ms[0]:.1f} - {overheads_ms[-1]:.1f}",
        note or contender.what,
    ]


@contextmanager
def slower_files(folder: Path) -> Iterator[tuple[Path | None, str]]:
    """Where each file takes longer to open and to create; or why there is no such place."""
    try:
        import pytest

        from tests.faults.fuse import mount_fuse, needs_fuse
    except ImportError as error:
        yield None, str(error)
        return
    (no_fuse,) = needs_fuse.args
    if no_fuse:
        yield None, needs_fuse.kwargs["reason"]
        return
    delays_s = {"open": SLOWER_S, "create": SLOWER_S}
    with ExitStack() as mounted:
        mounting = mount_fuse(folder / "behind", folder / "slower", delays_s=delays_s)
        try:
            path = mounted.enter_context(mounting).path
        except pytest.skip.Exception as error:
            yield None, str(error)
            return
        yield path, ""


def parts_by_model(parts: Sequence[str], model: Size | None) -> dict[Size, list[str]]:
    """Which parts are measured with which model; `model` is that of all of them."""
    by_model: dict[Size, list[str]] = {}
    for part in parts:
        by_model.setdefault(model or MODEL_OF[part], []).append(part)
    return by_model


def chosen_of(
    everybody: Sequence[Contender], parts: Sequence[str], args: argparse.Namespace
) -> list[Contender]:
    if not PARTS_WITH_SLOW_FILES.intersection(parts):
        everybody = [c for c in everybody if not c.is_slow]
    if args.only:
        return [c for c in everybody if c.name in args.only.split(",")]
    # Peers have no aim to reach; with slower files they cost two minutes.
    return [c for c in everybody if not c.is_slow or args.slow_peers or c.is_ours]


def show(
    console: Console, results: Results, models: Mapping[Size, Sequence[str]], tokens: int
) -> None:
    expected = tokens // BLOCK_TOKENS * BLOCK_TOKENS
    copied = memory_bandwidth()
    for size, parts in models.items():
        megabytes = expected * KV_BYTES_PER_TOKEN[size] / 1e6
        console.print(
            f"{', '.join(parts)}: model {size}, of which {expected} tokens have {megabytes:.0f} MB "
            f"of KV; one thread copies that in {megabytes * 1e9 / copied:.1f} ms"
        )
    if results.latency:
        console.print(handoff_latency.table(results.latency))
    if results.races:
        console.print(race.table(results.races))
    if results.paces:
        console.print(pace.table(results.paces))
    if results.hits:
        console.print(hits_table(results.hits, expected))
    for aim, found, is_reached in (
        *handoff_latency.aims(results.latency),
        *pace.aims(results.paces),
    ):
        verdict = "[green]reached[/green]" if is_reached else "[red]missed[/red]"
        console.print(f"{verdict}  {aim}: {found}", highlight=False)


def run(
    console: Console,
    size: Size,
    parts: Sequence[str],
    store: Path,
    mounted: Path | None,
    args: argparse.Namespace,
    results: Results,
) -> None:
    """The parts that are measured with one model, each contender's in turn."""
    model = make_model(store / "model", size=size)
    # In folders of their own: not all of the peers tell models apart.
    everybody = contenders(store / size, mounted / size if mounted else None)
    (store / size / "warm").mkdir(parents=True)
    if mounted:
        (mounted / size).mkdir()
    for contender in chosen_of(everybody, parts, args):
        started_s = time.monotonic()
        console.print(f"{contender.name}: starting two servers with model {size}")
        with running(contender, model, size=size, logs=store / "logs" / size) as servers:
            ready_s = time.monotonic() - started_s
            measure(servers, parts, args, results)
            spent_s = time.monotonic() - started_s - ready_s
        console.print(f"  ready after {ready_s:.0f} s, measured in {spent_s:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="of each mode and length")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1500, 3500])
    parser.add_argument("--rounds", type=int, default=3, help="of the pace, with and without loads")
    parser.add_argument("--new-tokens", type=int, default=300, help="that each stream decodes")
    parser.add_argument("--model", choices=KV_BYTES_PER_TOKEN, help="of all parts")
    parser.add_argument("--parts", default=",".join(MODEL_OF), help="separated by commas")
    parser.add_argument("--slow-peers", action="store_true", help="peers with slower files, too")
    parser.add_argument("--only", default="", help="names of contenders, separated by commas")
    args = parser.parse_args()
    args.parts = args.parts.split(",")
    unknown = set(args.parts) - set(MODEL_OF)
    if unknown:
        parser.error(
            f"--parts: there is no {', '.join(sorted(unknown))}, but {', '.join(MODEL_OF)}"
        )
    console = Console()
    console = Console(width=max(console.width, MIN_WIDTH))
    store = Path(tempfile.mkdtemp(prefix="ucm-bench-"))
    results = Results()
    models = parts_by_model(args.parts, args.model)
    for line in left_out():
        console.print(line)
    try:
        with slower_files(store) as (mounted, why_not):
            if mounted is None:
                console.print(f"no slower files: {why_not}")
            for size, parts in models.items():
                run(console, size, parts, store, mounted, args, results)
    finally:
        shutil.rmtree(store, ignore_errors=True)
    show(console, results, models, max(args.tokens))


if __name__ == "__main__":
    main()
