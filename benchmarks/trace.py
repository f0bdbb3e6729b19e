"""Replays conversations and recorded requests on real vLLM, beside all peers in one run.

Each contender gets the same prompts at the same times, through the real proxy, with a store of its
own that is empty at first: vLLM alone (one engine), UCM with one and with two nodes, vLLM's fs
tier, its ExampleConnector, and LMCache's MP server with one and with two nodes.

    python benchmarks/trace.py [--trace conversation_trace.jsonl synthetic_trace.jsonl]
        [--topology 1p1d,2p2d] [--contenders ucm-files,lmcache-files] [--requests 40] [--per-s 0.5]
        [--agents 6] [--turns 8] [--model small] [--json FILE] [--chart FILE.svg]

The recorded requests are Mooncake's: FAST25-release/traces of github.com/kvcache-ai/Mooncake.
Answers are compared with those of vLLM alone: greedy, in float32. A peer that is faster is shown as
such; it is no error. Servers' logs are kept where a request or a server has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import lmcache_peer, trace_report
from benchmarks.contenders import BLOCK_TOKENS, Contender, contenders, left_out
from benchmarks.trace_replay import Played, play, warm_up
from benchmarks.trace_report import PLAIN, Figures
from benchmarks.trace_servers import (
    MAX_MODEL_LEN,
    TOPOLOGIES,
    Fleet,
    Topology,
    behind_a_proxy,
    plain,
)
from benchmarks.trace_workload import Workload, agents, recorded
from examples.cluster.client import RequestFailed
from examples.cluster.models import make_model
from examples.cluster.processes import ServerFailed

# In float32.
KV_BYTES_PER_TOKEN = {"small": 16 << 10, "mid": 64 << 10}
PUBLISHED = "FAST25-release/traces of https://github.com/kvcache-ai/Mooncake"
MIN_WIDTH = 180
# Not its own kind of storage: our store below vLLM's offloading (docs/tiering.md).
UNASKED = "tiering"
# Of what an engine may see, for the last tokens of an answer.
SPARE_TOKENS = 192


class Run:
    """All that is measured, one contender after the other."""

    def __init__(self, args: argparse.Namespace, console: Console, folder: Path) -> None:
        self._args = args
        self._console = console
        self._folder = folder
        self._model = make_model(folder / "model", size=args.model)
        self._kv_cache_bytes = args.kv_tokens * KV_BYTES_PER_TOKEN[args.model]
        self.workloads = workloads(args)
        self.rows: list[Figures] = []
        self.failures: list[str] = []
        self._right: dict[str, Played] = {}

    def everybody(self) -> None:
        """Vanilla vLLM first: its answers are the right ones."""
        self._measure(PLAIN, "", self._plain(), is_ours=False)
        for name in self._args.topology:
            topology = TOPOLOGIES[name]
            store = self._folder / "store"
            for contender in contenders(store, None):
                if contender.name not in self._args.contenders:
                    continue
                (store / "warm").mkdir(parents=True)
                fleet = self._behind_a_proxy(contender, topology)
                try:
                    self._measure(contender.name, name, fleet, is_ours=contender.is_ours)
                except (ServerFailed, RequestFailed) as error:
                    # The others are measured all the same.
                    self.failures.append(f"{contender.name} {name}: {error}")
                    self._console.print(self.failures[-1], markup=False)
                shutil.rmtree(store)

    def _plain(self) -> AbstractContextManager[Fleet]:
        return plain(self._model, kv_cache_bytes=self._kv_cache_bytes, logs=self._folder / "logs")

    def _behind_a_proxy(
        self, contender: Contender, topology: Topology
    ) -> AbstractContextManager[Fleet]:
        return behind_a_proxy(
            contender,
            topology,
            self._model,
            kv_cache_bytes=self._kv_cache_bytes,
            logs=self._folder / "logs" / topology.name,
        )

    def _measure(
        self,
        name: str,
        topology: str,
        starting: AbstractContextManager[Fleet],
        *,
        is_ours: bool,
    ) -> None:
        began_s = time.monotonic()
        with starting as fleet:
            warm_up(fleet, kv_tokens=self._args.kv_tokens, seed=self._args.seed)
            ready_s = time.monotonic() - began_s
            for workload in self.workloads:
                played = play(fleet, workload)
                right = self._right.setdefault(workload.name, played)
                row = trace_report.figures(
                    workload.name, topology, name, is_ours=is_ours, played=played, right=right
                )
                self.rows.append(row)
                self._say_failures(played)
        spent_s = time.monotonic() - began_s - ready_s
        where = f"{name} {topology}".strip()
        self._console.print(f"{where}: ready after {ready_s:.0f} s, replayed in {spent_s:.0f} s")

    def _say_failures(self, played: Played) -> None:
        for each in played.asked:
            if each.failure:
                self._console.print(f"  session {each.session}, turn {each.turn}: {each.failure}")

    @property
    def has_failed(self) -> bool:
        return bool(self.failures) or any(row.failed for row in self.rows)


def workloads(args: argparse.Namespace) -> list[Workload]:
    max_tokens = MAX_MODEL_LEN - SPARE_TOKENS
    made = [
        agents(num=args.agents, turns=args.turns, max_tokens=max_tokens, seed=args.seed)
    ] * bool(args.agents)
    made += [
        recorded(
            path,
            block_tokens=BLOCK_TOKENS,
            requests=args.requests,
            per_s=args.per_s,
            max_tokens=max_tokens,
            seed=args.seed,
        )
        for path in args.trace
    ]
    return made


def show(console: Console, run: Run, args: argparse.Namespace, about: dict[str, Any]) -> None:
    console.print(about["line"])
    for workload in run.workloads:
        console.print(f"{workload.name}: {workload.what}; {workload.num_prompt_tokens} tokens")
    console.print(
        "times in ms; computed: tokens of prompts that engines computed, per token asked; skipped: "
        "requests that the proxy left to decode alone; read and written: by system calls of all "
        "processes on files and pipes (/proc/PID/io); differ: sessions with an answer that is not "
        "plain's"
    )
    alone = {row.workload: row for row in run.rows if not row.topology}
    for topology in args.topology:
        for workload in run.workloads:
            key = topology, workload.name
            rows = [row for row in run.rows if (row.topology, row.workload) == key]
            if not rows:
                continue
            rows.insert(0, alone[workload.name])
            console.print(trace_report.table(rows))
            console.print(trace_report.cpu_table(rows))
            for is_first, line in trace_report.verdicts(rows):
                verdict = "[green]first[/green]" if is_first else "[red]not first[/red]"
                console.print(f"{verdict}  {line}", highlight=False)


def about_machine(args: argparse.Namespace) -> dict[str, Any]:
    line = (
        f"model {args.model} (random weights, float32, {KV_BYTES_PER_TOKEN[args.model] >> 10} KiB "
        f"of KV a token), blocks of {BLOCK_TOKENS} tokens, {args.kv_tokens} tokens of KV cache an "
        f"engine; {os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    )
    return {"line": line, "command": sys.argv, "seed": args.seed}


def draw(console: Console, found: Path, chart: Path) -> None:
    """By an interpreter that has the packages of the peers."""
    script = Path(__file__).with_name("trace_chart.py")
    path = os.pathsep.join(filter(None, (str(lmcache_peer.ENVIRONMENT), os.getenv("PYTHONPATH"))))
    subprocess.run(
        [sys.executable, str(script), str(found), str(chart)],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    console.print(f"chart: {chart}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, nargs="+", default=[], help="Mooncake's JSONL files")
    parser.add_argument("--topology", default=",".join(TOPOLOGIES), help="separated by commas")
    parser.add_argument("--contenders", default="", help=f"else all but {UNASKED}")
    parser.add_argument("--requests", type=int, default=40, help="of each trace")
    parser.add_argument("--per-s", type=float, default=0.5, help="of them, requests a second")
    parser.add_argument("--agents", type=int, default=6, help="0 leaves them out")
    parser.add_argument("--turns", type=int, default=8, help="of each agent, at most")
    parser.add_argument("--kv-tokens", type=int, default=16384, help="KV cache of an engine")
    parser.add_argument("--model", choices=KV_BYTES_PER_TOKEN, default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where figures go, the chart's among them")
    parser.add_argument("--chart", type=Path, help="an .svg or .png file")
    args = parser.parse_args()
    args.topology = args.topology.split(",")
    args.contenders = [name for name in args.contenders.split(",") if name]
    if unknown := set(args.topology) - TOPOLOGIES.keys():
        missing = ", ".join(sorted(unknown))
        parser.error(f"--topology: there is no {missing}, but {', '.join(TOPOLOGIES)}")
    names = [contender.name for contender in contenders(Path(), None)]
    args.contenders = args.contenders or [name for name in names if name != UNASKED]
    if unknown := set(args.contenders) - set(names):
        missing = ", ".join(sorted(unknown))
        known = "; ".join([", ".join(names), *left_out()])
        parser.error(f"--contenders: there is no {missing}, but {known}")
    for path in args.trace:
        if not path.is_file():
            parser.error(f"--trace: there is no file {path}; they are published in {PUBLISHED}")
    if args.kv_tokens <= MAX_MODEL_LEN:
        parser.error(f"--kv-tokens: one prompt has up to {MAX_MODEL_LEN}; more must fit")
    if not args.trace and not args.agents:
        parser.error("nothing to replay: no --trace, and --agents 0")
    check_outputs(parser, args)
    return args


def check_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Now: they are written after all has been measured."""
    for flag, path in (("--json", args.json), ("--chart", args.chart)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{flag}: there is no directory {path.parent}")
    if args.chart is not None and args.chart.suffix not in (".svg", ".png"):
        parser.error(f"--chart: {args.chart} is no .svg or .png file")
    if args.chart is not None and (why_not := lmcache_peer.why_not()):
        parser.error(f"--chart: what draws it comes with the peers: {why_not}")


def clear(console: Console, folder: Path, *, keeps_logs: bool) -> None:
    logs = folder / "logs"
    for each in list(folder.iterdir()):
        if each != logs or not keeps_logs:
            shutil.rmtree(each) if each.is_dir() else each.unlink()
    if logs.is_dir():
        console.print(f"something failed; logs are in {logs}")
    else:
        folder.rmdir()


def main() -> None:
    args = arguments()
    console = Console()
    console = Console(width=max(console.width, MIN_WIDTH))
    for line in left_out():
        console.print(line)
    folder = Path(tempfile.mkdtemp(prefix="ucm-trace-"))
    about = about_machine(args)
    keeps_logs = True
    try:
        run = Run(args, console, folder)
        run.everybody()
        keeps_logs = run.has_failed
        show(console, run, args, about)
        found = args.json or folder / "found.json"
        found.write_text(json.dumps(trace_report.as_json(run.rows, about)))
        if args.chart:
            draw(console, found, args.chart)
    finally:
        clear(console, folder, keeps_logs=keeps_logs)


if __name__ == "__main__":
    main()
