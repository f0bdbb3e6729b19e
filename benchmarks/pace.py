"""What a hit that loads does to the requests that decode beside it.

Some requests decode on one instance; the time between their tokens is measured from when all have
begun until one has ended. Rounds take turns: with nothing beside them; with another request that
hits 3500 tokens in the store, again and again, asked with prefill's receipt as the proxy does; and
with one that hits as many in decode's own prefix cache, which is what vLLM itself takes for such a
request. That cache is too small for as many prompts as are loaded in turn.

The p99 over a whole round depends on how often something is asked; that over the gaps which a
request overlaps does not, and is the harder one. What storing answers costs: answers.py.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.contenders import Contender, Servers, prompt_of
from benchmarks.streaming import stream
from examples.cluster.client import Answer
from ucm.handoff import Wanted, params

NUM_STREAMS = 4
SHORT_TOKENS = 16
NUM_PROMPTS = 3
BETWEEN_LOADS_S = 0.2
SETTLE_S = 1.5
AIM = 1.5

NOTHING, LOADS, LOCAL_HITS = "nothing", "loads", "local hits"

Span = tuple[float, float]


@dataclass
class Beside:
    """Seconds between tokens beside requests of one kind; of these, those that such a request
    overlaps; and from asking it to its token."""

    gaps_s: list[float] = field(default_factory=list)
    during_s: list[float] = field(default_factory=list)
    asked_s: list[float] = field(default_factory=list)
    hit_tokens: int = 0


@dataclass
class Pace:
    contender: Contender
    beside: dict[str, Beside] = field(
        default_factory=lambda: {kind: Beside() for kind in (NOTHING, LOADS, LOCAL_HITS)}
    )

    def over_nothing(self, gaps_s: Sequence[float]) -> float:
        """The p99 of these gaps over that without other requests."""
        return _p99_ms(gaps_s) / _p99_ms(self.beside[NOTHING].gaps_s)


@dataclass(frozen=True)
class _Hit:
    """A prompt, and what a proxy tells decode of it."""

    prompt: list[int]
    params: dict[str, Any]


def measure(servers: Servers, *, tokens: int, new_tokens: int, rounds: int) -> Pace:
    """`tokens` are hit, `new_tokens` is what each stream decodes in a round."""
    rng = random.Random(2)
    pace = Pace(servers.contender)
    stored = cycle([_stored(servers, prompt_of(tokens, rng)) for _ in range(NUM_PROMPTS)])
    known = cycle([_Hit(prompt_of(tokens, rng), {})])
    time.sleep(SETTLE_S)
    for number in range(1 + rounds):
        for kind, hits in ((NOTHING, None), (LOADS, stored), (LOCAL_HITS, known)):
            if kind == LOCAL_HITS:
                _ask(servers, next(known))
            before = servers.decode.client.counters()
            streams, asked = _round(servers, rng, new_tokens, hits)
            if number == 0:
                continue  # warms up
            grown = servers.decode.client.counters() - before
            beside = pace.beside[kind]
            gaps = list(_gaps(streams))
            beside.gaps_s += [e - b for b, e in gaps]
            beside.during_s += [e - b for b, e in gaps if any(_overlap((b, e), x) for x in asked)]
            beside.asked_s += [e - b for b, e in asked]
            beside.hit_tokens += grown.external_hits if kind == LOADS else grown.local_hits
    return pace


def _stored(servers: Servers, prompt: list[int]) -> _Hit:
    return _Hit(prompt, servers.prefill.client.prefill(prompt, params=params(Wanted())))


def _round(
    servers: Servers, rng: random.Random, new_tokens: int, hits: Iterator[_Hit] | None
) -> tuple[list[Answer], list[Span]]:
    began = threading.Semaphore(0)
    one_ended = threading.Event()

    def decode(prompt: Sequence[int]) -> Answer:
        client = servers.decode.client
        try:
            return stream(client, prompt, max_tokens=new_tokens, on_first=began.release)
        finally:
            one_ended.set()

    asked: list[Span] = []
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        prompts = [prompt_of(SHORT_TOKENS, rng) for _ in range(NUM_STREAMS)]
        futures = [pool.submit(decode, prompt) for prompt in prompts]
        for _ in futures:
            began.acquire(timeout=servers.decode.client.timeout_s)
        while hits is not None and not one_ended.wait(BETWEEN_LOADS_S):
            found = _ask(servers, next(hits))
            asked.append((found.sent_s, found.arrived_s[0]))
        streams = [future.result() for future in futures]
    return streams, asked


def _ask(servers: Servers, hit: _Hit) -> Answer:
    extra = {"kv_transfer_params": hit.params} if hit.params else {}
    return stream(servers.decode.client, hit.prompt, max_tokens=1, **extra)


def _gaps(streams: Sequence[Answer]) -> Iterator[Span]:
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
    for column in ("contender", "beside", "gaps"):
        shown.add_column(column)
    for column in ("n", "median", "p99", "max", "p99 over nothing"):
        shown.add_column(column, justify="right")
    shown.add_column("")
    for pace in paces:
        for kind, beside in pace.beside.items():
            row = (pace.contender.name, kind)
            shown.add_row(*row, "all", *_numbers(beside.gaps_s, pace), _asked(beside))
            if beside.asked_s:
                shown.add_row(*row, "during one", *_numbers(beside.during_s, pace))
    return shown


def _asked(beside: Beside) -> str:
    if not beside.asked_s:
        return ""
    num_asked, ttft_ms = len(beside.asked_s), float(np.median(beside.asked_s)) * 1000
    return f"{num_asked} of {beside.hit_tokens // num_asked} tokens, {ttft_ms:.0f} ms to the token"


def _numbers(gaps_s: Sequence[float], pace: Pace) -> list[str]:
    if not gaps_s:
        return ["0", "", "", "", ""]
    return [
        str(len(gaps_s)),
        f"{np.median(gaps_s) * 1000:.1f}",
        f"{_p99_ms(gaps_s):.1f}",
        f"{max(gaps_s) * 1000:.1f}",
        f"{pace.over_nothing(gaps_s):.2f}",
    ]


def aims(paces: Sequence[Pace]) -> Iterator[tuple[str, str, bool]]:
    """What is aimed at, what was found, and whether that is enough."""
    for pace in paces:
        loads, local = pace.beside[LOADS], pace.beside[LOCAL_HITS]
        aim = f"{pace.contender.name}: p99 between tokens with loads at most {AIM} times"
        ratio = pace.over_nothing(loads.gaps_s)
        during = f"gaps during a load alone: {pace.over_nothing(loads.during_s):.2f}"
        own = f"during a local hit: {pace.over_nothing(local.during_s):.2f}"
        yield aim, f"{ratio:.2f} ({during}, {own})", ratio <= AIM
