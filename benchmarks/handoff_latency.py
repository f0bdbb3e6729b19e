"""From prefill's token to decode's first, through the real proxy.

Hand-off latency is the client's TTFT at the proxy minus the proxy's `prefill` stage (Server-Timing:
from the begin of the prefill leg until its answer is whole). So it begins when the proxy has
prefill's only token, ends when the client has decode's first, and has the proxy's own time in it.
With `overlap` the stage ends with decode's first byte at the latest, so a decode that was faster
than prefill's answer counts as about 0, not as less. TTFT is shown as well: what overlap takes from
a prefill on the same machine would hide in the difference.

Each prompt is new to both engines. Afterwards decode is asked for it directly: the local prefix
hit, which computes what lies behind the last full block; and prefill, whose own answer is the
right one.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from rich.table import Table

from benchmarks.contenders import KV_CACHE_TOKENS, Contender, Servers, prompt_of
from benchmarks.streaming import stages_s, stream
from examples.cluster.client import Counters, by_label, total

MAX_TOKENS = 4
# For what still runs behind an answer, such as writes.
PAUSE_S = 0.3
RATIO_AIM = 1.5
LOCAL_AIM_MS = 20.0

_RECOMPUTED = "ucm_handoff_recomputed_tokens_total"
_WAITED = "ucm_handoff_wait_seconds_sum"


@dataclass(frozen=True)
class Sample:
    """One hand-off. `computed_tokens` of the prompt were computed by decode, for what reason ever;
    `recomputed` are promised ones, by reason."""

    ttft_s: float
    prefill_s: float
    local_s: float
    waited_s: float
    computed_tokens: int
    recomputed: Counter[str]
    is_right: bool

    @property
    def handoff_s(self) -> float:
        return self.ttft_s - self.prefill_s


@dataclass(frozen=True)
class Group:
    """The samples of one contender, mode and length."""

    contender: Contender
    handoff: str
    tokens: int
    samples: list[Sample]

    @property
    def handoff_ms(self) -> list[float]:
        return [s.handoff_s * 1000 for s in self.samples]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.handoff_ms)

    @property
    def over_local_ms(self) -> float:
        return statistics.median((s.handoff_s - s.local_s) * 1000 for s in self.samples)


def measure(servers: Servers, *, lengths: Sequence[int], repeats: int) -> list[Group]:
    """Modes and lengths take turns, so that what changes on the machine changes for all."""
    rng = random.Random(1)
    found: defaultdict[tuple[int, str], list[Sample]] = defaultdict(list)
    _warm_up(servers, rng)
    for _ in range(repeats):
        for tokens in lengths:
            for handoff in servers.proxies:
                found[tokens, handoff].append(_sample(servers, handoff, prompt_of(tokens, rng)))
    return [
        Group(servers.contender, handoff, tokens, samples)
        for (tokens, handoff), samples in found.items()
    ]


def _warm_up(servers: Servers, rng: random.Random) -> None:
    """Both engines touch all of their memory, and each mode has been used."""
    tokens = 3500
    proxies = cycle(servers.proxies.values())
    for proxy, _ in zip(proxies, range(-(-KV_CACHE_TOKENS // tokens)), strict=False):
        stream(proxy.client, prompt_of(tokens, rng), max_tokens=MAX_TOKENS)


def _sample(servers: Servers, handoff: str, prompt: list[int]) -> Sample:
    decode = servers.decode.client
    time.sleep(PAUSE_S)
    before = decode.metrics()
    handed = stream(servers.proxies[handoff].client, prompt, max_tokens=MAX_TOKENS)
    after = decode.metrics()
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    local = stream(decode, prompt, max_tokens=MAX_TOKENS)
    right = stream(servers.prefill.client, prompt, max_tokens=MAX_TOKENS)
    assert handed.headers["x-ucm-pd-path"] == "pd", handed.headers
    return Sample(
        ttft_s=handed.ttft_s,
        prefill_s=stages_s(handed)["prefill"],
        local_s=local.ttft_s,
        waited_s=total(grown, _WAITED),
        computed_tokens=Counters.of(grown).computed,
        recomputed=by_label(grown, _RECOMPUTED, "reason"),
        is_right=handed.token_ids == right.token_ids,
    )


def table(groups: Sequence[Group]) -> Table:
    shown = Table(title="hand-off: from prefill's answer to decode's first token (ms)")
    for column in ("contender", "mode", "tokens"):
        shown.add_column(column)
    for column in (
        *("median", "p90", "max", "n", "TTFT", "waited", "local hit", "over it"),
        *("computed", "recomputed"),
    ):
        shown.add_column(column, justify="right")
    for group in groups:
        shown.add_row(*_row(group))
    return shown


def _row(group: Group) -> list[str]:
    def median_ms(seconds: Iterator[float]) -> str:
        return f"{statistics.median(seconds) * 1000:.0f}"

    samples = group.samples
    # Adding leaves out what is zero.
    recomputed = sum((s.recomputed for s in samples), Counter())
    wrong = sum(not s.is_right for s in samples)
    notes = [f"{count} {reason}" for reason, count in recomputed.items()]
    notes += [f"{wrong} of {len(samples)} answers differ"] if wrong else []
    return [
        group.contender.name,
        group.handoff,
        str(group.tokens),
        f"{group.median_ms:.0f}",
        f"{np.percentile(group.handoff_ms, 90):.0f}",
        f"{max(group.handoff_ms):.0f}",
        str(len(samples)),
        median_ms(s.ttft_s for s in samples),
        median_ms(s.waited_s for s in samples),
        median_ms(s.local_s for s in samples),
        f"{group.over_local_ms:+.0f}",
        f"{statistics.median(s.computed_tokens for s in samples):.0f}",
        ", ".join(notes) or "0",
    ]


def aims(groups: Sequence[Group]) -> Iterator[tuple[str, str, bool]]:
    """What is aimed at, what was found, and whether that is enough."""
    by_mode = {(g.contender.name, g.tokens, g.handoff): g for g in groups}
    for (name, tokens, handoff), group in by_mode.items():
        overlap = by_mode.get((name, tokens, "overlap"))
        if handoff == "chain" and overlap and tokens > group.contender.chunk_tokens:
            # Nothing is left to compare where decode was there before prefill's answer.
            ratio = group.median_ms / max(overlap.median_ms, 0.1)
            aim = f"{name}, {tokens} tokens: chain / overlap at least {RATIO_AIM}"
            yield aim, f"{ratio:.2f}", ratio >= RATIO_AIM
    for (name, tokens, handoff), group in by_mode.items():
        if group.contender.is_one_node and group.contender.is_ours:
            aim = f"{name}, {tokens} tokens, {handoff}: at most {LOCAL_AIM_MS:.0f} ms over local"
            yield aim, f"{group.over_local_ms:+.1f} ms", group.over_local_ms <= LOCAL_AIM_MS
