"""What the proxy adds to a request, next to asking decode directly, in one run.

Two mock engines answer at once (or after a delay that the request names), the proxy between them is
the real one, and the clients are a process of their own. Each request has a 4 KB prompt that nobody
has sent before, so both legs are sent: added latency includes a whole prefill leg that computes
nothing. Only the proxy's CPU time is its own; requests/s are what proxy, engines and clients reach
together on the cores of this machine.

Clients that leave note the time, and so does the engine when it hears of it: a real one would go on
computing for nobody until then.

    python benchmarks/proxy.py [--repeats 3] [--requests 2000]

Measures nothing but noise while something else runs on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import mock_engine
from benchmarks.mock_engine import (
    ANSWER,
    DECODE,
    DELAY_HEADER,
    HELD_PATH,
    HOLD_HEADER,
    PREFILL,
    STREAM,
)
from examples.cluster.processes import GuardedProcess, HttpServer, end_run, free_port, run_folder

PATH: Final = "/v1/completions"
PROMPT_CHARS: Final = 4096
START_TIMEOUT_S: Final = 30.0
LOAD_TIMEOUT_S: Final = 110.0
NUM_WARM_UP: Final = 200

SLOW_REQUESTS: Final = 1000
SLOW_LEG_S: Final = 1.0
ADDED_AIM_MS: Final = 1.0
CPU_AIM_MS: Final = 0.5
SLOW_AIM_S: Final = 6.0
LEAVING_AIM_MS: Final = 200.0
NUM_LEAVING: Final = 20
POLL_S: Final = 0.005

Samples = defaultdict[str, list[float]]


@dataclass(frozen=True)
class Load:
    """What one run of clients saw."""

    wall_s: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Bench:
    proxy: HttpServer
    prefill: HttpServer
    decode: HttpServer

    def load(
        self, server: HttpServer, *, clients: int, requests: int, delay_s: float = 0.0
    ) -> Load:
        """Clients in a process of their own, each with one request at a time."""
        numbers = {"clients": clients, "requests": requests, "delay-s": delay_s}
        # In decode's answer there is no path; in the proxy's it says that both legs were sent.
        expected = "pd" if server is self.proxy else ""
        options = [f"--{name}={value}" for name, value in numbers.items()]
        found = self._clients(f"--load={server.port}", *options, f"--path={expected}")
        return Load(**found)

    def leave(self, stage: str) -> list[float]:
        """For each of some clients, how long after it had left the engine heard of it, in ms."""
        engine = self.prefill if stage == PREFILL else self.decode
        ports = (f"--leave={self.proxy.port}", f"--held-at={engine.port}")
        found: list[float] = self._clients(*ports, f"--stage={stage}")
        return found

    def _clients(self, *options: str) -> Any:
        """What this script, run as a process of its own, prints as JSON."""
        log = run_folder() / "clients.log"
        log.unlink(missing_ok=True)
        with GuardedProcess([sys.executable, __file__, *options], log=log) as process:
            failed = process.wait(LOAD_TIMEOUT_S)
        if failed:
            raise SystemExit(f"the clients failed\n{process.log_tail()}")
        return json.loads(process.log_text().splitlines()[-1])

    def proxy_cpu_s(self) -> float:
        (process,) = self.proxy.processes()
        # What follows the name, which is in brackets, begins with the third field.
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- processes of their own ---------------------------------------------------------------------


async def send_load(
    url: str, *, clients: int, requests: int, delay_s: float, path: str
) -> dict[str, float]:
    """Fails on the first answer that is not 200 or came another way than `path`."""
    numbers = iter(range(requests))
    nonce = f"{os.getpid()} {time.time_ns()}"
    filler = "the prompt " * (PROMPT_CHARS // 11)
    headers = {"Content-Type": "application/json"}
    if delay_s:
        headers[DELAY_HEADER] = str(delay_s)
    took_s: list[float] = []

    async def one_client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            prompt = f"{nonce} {number} {filler}"
            fields = {"model": "m", "prompt": prompt, "max_tokens": 16, "temperature": 0}
            body = json.dumps(fields).encode()
            started_s = time.perf_counter()
            async with session.post(url, data=body, headers=headers) as response:
                answer = await response.read()
            took_s.append(time.perf_counter() - started_s)
            came = response.headers.get("x-ucm-pd-path", "")
            if (response.status, answer, came) != (200, ANSWER, path):
                raise SystemExit(f"{response.status} by {came!r}: {answer[:500]!r}")

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        started_s = time.perf_counter()
        await asyncio.gather(*(one_client(session) for _ in range(clients)))
        wall_s = time.perf_counter() - started_s
    hundredths = statistics.quantiles(took_s, n=100)
    return {"wall_s": wall_s, "p50_ms": 1000 * hundredths[49], "p99_ms": 1000 * hundredths[98]}


async def leave(url: str, held_url: str, *, stage: str) -> list[float]:
    """See Bench.leave. One after another, each as soon as its request has come to that stage."""

    async def ask(session: aiohttp.ClientSession, number: int, comes: asyncio.Event) -> None:
        fields = {"prompt": f"{os.getpid()} {number}", "stream": stage == STREAM}
        async with session.post(url, json=fields, headers={HOLD_HEADER: stage}) as response:
            async for _ in response.content.iter_any():
                comes.set()
        raise SystemExit("it was answered")

    async def held(session: aiohttp.ClientSession, *, count: int) -> list[float]:
        while True:
            async with session.get(held_url) as response:
                found = await response.json()
            if found["held"] == count:
                heard_s: list[float] = found["heard_s"]
                return heard_s
            await asyncio.sleep(POLL_S)

    took_ms: list[float] = []
    async with aiohttp.ClientSession() as session:
        for number in range(NUM_LEAVING):
            comes = asyncio.Event()
            client = asyncio.create_task(ask(session, number, comes))
            await held(session, count=1)
            if stage == STREAM:
                await comes.wait()
            left_s = time.monotonic()
            client.cancel()
            heard_s = (await held(session, count=0))[-1]
            took_ms.append(1000 * (heard_s - left_s))
    return took_ms


# -- the run ------------------------------------------------------------------------------------


def start(stack: ExitStack, *flags: str) -> Bench:
    """With further flags of the proxy. Everything that is started ends with `stack`, or with this
    process, however it ends."""
    engines = {}
    for role in (PREFILL, DECODE):
        port = free_port()
        command = [sys.executable, mock_engine.__file__, f"--port={port}", f"--role={role}"]
        log = run_folder() / f"{role}.log"
        engines[role] = stack.enter_context(HttpServer(command, port=port, log=log))
    port = free_port()
    command = [sys.executable, "-m", "ucm.pd.toy_proxy_server", "--host=127.0.0.1"]
    command += [f"--port={port}", "--min-prefill-tokens=0"]
    command += ["--prefiller-host=127.0.0.1", f"--prefiller-port={engines[PREFILL].port}"]
    command += ["--decoder-host=127.0.0.1", f"--decoder-port={engines[DECODE].port}"]
    # A line for each request goes there: what one would have in production too.
    log = run_folder() / f"proxy-{port}.log"
    proxy = stack.enter_context(HttpServer([*command, *flags], port=port, log=log))
    for server in (*engines.values(), proxy):
        server.wait_ready(START_TIMEOUT_S)
    return Bench(proxy, engines[PREFILL], engines[DECODE])


def measure_latency(bench: Bench, requests: int, taken: Samples) -> None:
    direct = bench.load(bench.decode, clients=1, requests=requests)
    ours = bench.load(bench.proxy, clients=1, requests=requests)
    taken["direct p50"].append(direct.p50_ms)
    taken["direct p99"].append(direct.p99_ms)
    taken["added p50"].append(ours.p50_ms - direct.p50_ms)
    taken["added p99"].append(ours.p99_ms - direct.p99_ms)


def measure_load(bench: Bench, clients: int, requests: int, taken: Samples) -> None:
    before_s = bench.proxy_cpu_s()
    load = bench.load(bench.proxy, clients=clients, requests=requests)
    cpu_s = bench.proxy_cpu_s() - before_s
    taken[f"cpu {clients}"].append(1000 * cpu_s / requests)
    taken[f"rate {clients}"].append(requests / load.wall_s)
    taken[f"p99 {clients}"].append(load.p99_ms)


def measure(bench: Bench, *, repeats: int, requests: int) -> Samples:
    taken: Samples = defaultdict(list)
    for server in (bench.decode, bench.proxy):
        bench.load(server, clients=32, requests=NUM_WARM_UP)
    for _ in range(repeats):
        measure_latency(bench, requests // 2, taken)
        for clients in (32, 512):
            measure_load(bench, clients, requests, taken)
        slow = bench.load(bench.proxy, clients=512, requests=SLOW_REQUESTS, delay_s=SLOW_LEG_S)
        taken["slow"].append(slow.wall_s)
    for stage in LEAVING:
        taken[f"leave {stage}"] += bench.leave(stage)
    return taken


LEAVING: Final = {
    PREFILL: "in prefill",
    DECODE: "before decode's first byte",
    STREAM: "in a stream",
}


ROWS: Final = (
    ("1 client", "decode asked directly, p50", "direct p50", "ms", None, ""),
    ("1 client", "decode asked directly, p99", "direct p99", "ms", None, ""),
    ("1 client", "added by the proxy, p50", "added p50", "ms", ADDED_AIM_MS, "below"),
    ("1 client", "added by the proxy, p99", "added p99", "ms", None, ""),
    ("32 clients", "CPU time of the proxy, per request", "cpu 32", "ms", CPU_AIM_MS, "at most"),
    ("32 clients", "requests/s", "rate 32", "/s", None, ""),
    ("32 clients", "latency, p99", "p99 32", "ms", None, ""),
    ("512 clients", "CPU time of the proxy, per request", "cpu 512", "ms", None, ""),
    ("512 clients", "requests/s", "rate 512", "/s", None, ""),
    ("512 clients", "latency, p99", "p99 512", "ms", None, ""),
    (
        "512 clients",
        f"{SLOW_REQUESTS} requests, each leg {SLOW_LEG_S:g} s: wall time",
        "slow",
        "s",
        SLOW_AIM_S,
        "under",
    ),
    *(
        (
            "1 client",
            f"leaves {where}: engine hears after",
            f"leave {stage}",
            "ms",
            LEAVING_AIM_MS,
            "under",
        )
        for stage, where in LEAVING.items()
    ),
)


def verdict(value: float, aim: float, how: str) -> str:
    good = value <= aim if how == "at most" else value < aim
    return "reached" if good else "missed"


def make_table(taken: Samples, *, repeats: int, requests: int) -> Table:
    table = Table(
        title=f"medians of {repeats} repeats, {requests} requests each (1 client: half), or of "
        f"{NUM_LEAVING} clients that leave"
    )
    for column in ("load", "what", "median", "least", "most", "aim"):
        table.add_column(
            column, justify="right" if column in ("median", "least", "most") else "left"
        )
    for load, what, name, unit, aim, how in ROWS:
        middle = statistics.median(taken[name])
        numbers = [middle, min(taken[name]), max(taken[name])]
        shown = [f"{n:.0f} {unit}" if unit == "/s" else f"{n:.3f} {unit}" for n in numbers]
        judged = f"{how} {aim:g} {unit}: {verdict(middle, aim, how)}" if aim else ""
        table.add_row(load, what, *shown, judged)
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=2000, help="of one load")
    # For the processes that this one starts.
    ports = ("load", "leave", "held-at")
    numbers = [*((name, int) for name in (*ports, "clients")), ("delay-s", float)]
    for name, kind in numbers:
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    for name in ("path", "stage"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.leave:
        url, held_url = f"http://127.0.0.1:{args.leave}{PATH}", f"http://127.0.0.1:{args.held_at}"
        print(json.dumps(asyncio.run(leave(url, held_url + HELD_PATH, stage=args.stage))))
    elif args.load:
        load = send_load(
            f"http://127.0.0.1:{args.load}{PATH}",
            clients=args.clients,
            requests=args.requests,
            delay_s=args.delay_s,
            path=args.path,
        )
        print(json.dumps(asyncio.run(load)))
    else:
        try:
            with ExitStack() as stack:
                taken = measure(start(stack), repeats=args.repeats, requests=args.requests)
        finally:
            end_run()
        table = make_table(taken, repeats=args.repeats, requests=args.requests)
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
