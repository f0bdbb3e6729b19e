"""What a hit that loads does to the requests that decode beside it.

Some requests decode on one instance; the time between their tokens is measured from when all have
begun until one has ended. Rounds with and without loads take turns: in the former another request
hits 3500 tokens in the store, again and again, asked with prefill's receipt as the proxy does. It
is not in decode's own prefix cache, which is too small for as many prompts as take turns.

The p99 over a whole round depends on how often something is loaded; that over the gaps which a
load overlaps does not, and is the harder one.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.contenders import Contender, Servers, prompt_of
from benchmarks.streaming import Stream, stream
from ucm.handoff import Wanted, params

NUM_STREAMS = 4
SHORT_TOKENS = 16
NUM_PROMPTS = 3
BETWEEN_LOADS_S = 0.2
SETTLE_S = 1.5
AIM = 1.5

Span = tuple[float, float]


@dataclass
class Pace:
    """Seconds between tokens: without loads, with them, and of the latter those that a load
    overlaps. `loads_s` are from asking to the token."""

    contender: Contender
    quiet_s: list[float] = field(default_factory=list)
    loaded_s: list[float] = field(default_factory=list)
    during_s: list[float] = field(default_factory=list)
    loads_s: list[float] = field(default_factory=list)
    hit_tokens: int = 0

    @property
    def ratio(self) -> float:
        return _p99_ms(self.loaded_s) / _p99_ms(self.quiet_s)

    @property
    def ratio_during(self) -> float:
        return _p99_ms(self.during_s) / _p99_ms(self.quiet_s)


@dataclass(frozen=True)
class _Hit:
    """A prompt in the store, and what a proxy tells decode of it."""

    prompt: list[int]
    params: dict[str, Any]


def measure(servers: Servers, *, tokens: int, new_tokens: int, rounds: int) -> Pace:
    """`tokens` are loaded, `new_tokens` is what each stream decodes in a round."""
    rng = random.Random(2)
    pace = Pace(servers.contender)
    hits = cycle([_stored(servers, prompt_of(tokens, rng)) for _ in range(NUM_PROMPTS)])
    threading.Event().wait(SETTLE_S)
    before = servers.decode.client.counters()
    for number in range(1 + rounds):
        for is_loaded in (False, True):
            streams, loads = _round(servers, rng, new_tokens, hits if is_loaded else None)
            if number == 0:
                before = servers.decode.client.counters()
                continue  # warms up
            gaps = list(_gaps(streams))
            (pace.loaded_s if is_loaded else pace.quiet_s).extend(e - b for b, e in gaps)
            pace.during_s.extend(e - b for b, e in gaps if any(_overlap((b, e), x) for x in loads))
            pace.loads_s.extend(e - b for b, e in loads)
    grown = servers.decode.client.counters() - before
    pace.hit_tokens = grown.external_hits // max(1, len(pace.loads_s))
    return pace


def _stored(servers: Servers, prompt: list[int]) -> _Hit:
    return _Hit(prompt, servers.prefill.client.prefill(prompt, params=params(Wanted())))


def _round(
    servers: Servers, rng: random.Random, new_tokens: int, hits: Iterator[_Hit] | None
) -> tuple[list[Stream], list[Span]]:
    began = threading.Semaphore(0)
    one_ended = threading.Event()

    def decode(prompt: Sequence[int]) -> Stream:
        client = servers.decode.client
        try:
            return stream(client, prompt, max_tokens=new_tokens, on_first=began.release)
        finally:
            one_ended.set()

    loads: list[Span] = []
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        prompts = [prompt_of(SHORT_TOKENS, rng) for _ in range(NUM_STREAMS)]
        futures = [pool.submit(decode, prompt) for prompt in prompts]
        for _ in futures:
            began.acquire(timeout=servers.decode.client.timeout_s)
        while hits is not None and not one_ended.wait(BETWEEN_LOADS_S):
            hit = next(hits)
            found = stream(
                servers.decode.client, hit.prompt, max_tokens=1, kv_transfer_params=hit.params
            )
            loads.append((found.sent_s, found.arrived_s[0]))
        streams = [future.result() for future in futures]
    return streams, loads


def _gaps(streams: Sequence[Stream]) -> Iterator[Span]:
    """Between two tokens of one stream, while all of them decode."""
    begin_s = max(s.arrived_s[0] for s in streams)
    end_s = min(s.arrived_s[-1] for s in streams)
    for each in streams:
        for gap in pairwise(each.arrived_s):
            if begin_s < gap[0] and gap[1] <= end_s:
                yield gap


def _overlap(a: Span, b: Span) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _p99_ms(seconds: Sequence[float]) -> float:
    return float(np.percentile(seconds, 99)) * 1000 if seconds else float("nan")


def table(paces: Sequence[Pace]) -> Table:
    shown = Table(title=f"pace of {NUM_STREAMS} requests while others hit (ms between tokens)")
    shown.add_column("contender")
    shown.add_column("gaps")
    for column in ("n", "median", "p99", "max", "p99 over quiet"):
        shown.add_column(column, justify="right")
    shown.add_column("")
    for pace in paces:
        loads = f"{len(pace.loads_s)} loads of {pace.hit_tokens} tokens"
        if pace.loads_s:
            loads += f", {np.median(pace.loads_s) * 1000:.0f} ms to the token each"
        rows = (
            ("without loads", pace.quiet_s, ""),
            ("with loads", pace.loaded_s, loads),
            ("during a load", pace.during_s, ""),
        )
        for name, gaps, note in rows:
            shown.add_row(pace.contender.name, name, *_numbers(gaps, pace), note)
    return shown


def _numbers(gaps: Sequence[float], pace: Pace) -> list[str]:
    if not gaps:
        return ["0", "", "", "", ""]
    p99_ms = _p99_ms(gaps)
    return [
        str(len(gaps)),
        f"{np.median(gaps) * 1000:.1f}",
        f"{p99_ms:.1f}",
        f"{max(gaps) * 1000:.1f}",
        f"{p99_ms / _p99_ms(pace.quiet_s):.2f}",
    ]


def aims(paces: Sequence[Pace]) -> Iterator[tuple[str, str, bool]]:
    """What is aimed at, what was found, and whether that is enough."""
    for pace in paces:
        aim = f"{pace.contender.name}: p99 between tokens with loads at most {AIM} times"
        during = f"{pace.ratio:.2f} (gaps during a load alone: {pace.ratio_during:.2f})"
        yield aim, during, pace.ratio <= AIM
