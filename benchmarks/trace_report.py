"""What trace.py has found, as figures, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from rich.table import Table

from benchmarks.trace_replay import Asked, Played

PLAIN: Final = "plain"
# Paths without a prefill (docs/pd.md).
_LEFT_OUT: Final = ("skip-known", "skip-short", "decode-only")
_MS: Final = 1000.0
_MB: Final = 1e6


@dataclass(frozen=True)
class Figures:
    """Of one contender, topology and workload; a row. `differ`: sessions with an answer that is not
    plain's. `skipped`: requests that the proxy has left to decode alone. `prefill_p50_ms` is the
    proxy's stage of that name. `stages_ms` has all of them, for each of `ttft_ms`."""

    workload: str
    topology: str
    contender: str
    is_ours: bool
    requests: int
    failed: int
    differ: int
    skipped: int
    ttft_p50_ms: float
    ttft_p90_ms: float
    ttft_p99_ms: float
    prefill_p50_ms: float
    tbt_p99_ms: float
    requests_per_s: float
    computed_per_token: float
    read_mb: float
    written_mb: float
    cpu_s: Mapping[str, float]
    paths: Mapping[str, int]
    ttft_ms: Sequence[float]
    stages_ms: Sequence[Mapping[str, float]]


def figures(
    workload: str, topology: str, contender: str, *, is_ours: bool, played: Played, right: Played
) -> Figures:
    """`right` is what a plain engine has answered. Pure."""
    well = [each for each in played.asked if not each.failure]
    ttft_ms = [each.ttft_s * _MS for each in well]
    gaps_ms = [gap * _MS for each in well for gap in each.gaps_s]
    return Figures(
        workload=workload,
        topology=topology,
        contender=contender,
        is_ours=is_ours,
        requests=len(played.asked),
        failed=len(played.asked) - len(well),
        differ=_differ(played.asked, right.asked),
        skipped=sum(count for path, count in played.paths.items() if path in _LEFT_OUT),
        ttft_p50_ms=_percentile(ttft_ms, 50),
        ttft_p90_ms=_percentile(ttft_ms, 90),
        ttft_p99_ms=_percentile(ttft_ms, 99),
        prefill_p50_ms=_percentile(
            [each.stages_s["prefill"] * _MS for each in well if "prefill" in each.stages_s], 50
        ),
        tbt_p99_ms=_percentile(gaps_ms, 99),
        requests_per_s=len(well) / played.seconds,
        computed_per_token=played.computed_tokens / max(1, played.prompt_tokens),
        read_mb=played.used.read_bytes / _MB,
        written_mb=played.used.written_bytes / _MB,
        cpu_s={part: round(spent, 2) for part, spent in played.used.cpu_s.items()},
        paths=dict(played.paths),
        ttft_ms=[round(each, 2) for each in ttft_ms],
        stages_ms=[
            {stage: round(spent * _MS, 2) for stage, spent in each.stages_s.items()}
            for each in well
        ],
    )


def _differ(asked: Iterable[Asked], right: Iterable[Asked]) -> int:
    """An answer that differs makes all prompts that go on from it others; those are not counted."""
    known = {(each.session, each.turn): each.answer for each in right}
    lost: set[int] = set()
    for each in asked:
        if each.failure or each.session in lost:
            continue
        if known.get((each.session, each.turn)) != each.answer:
            lost.add(each.session)
    return len(lost)


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent)) if values else float("nan")


def table(rows: Sequence[Figures]) -> Table:
    """Of one workload and topology."""
    plain = next(row for row in rows if row.contender == PLAIN)
    shown = Table(title=f"{rows[-1].workload}, {rows[-1].topology}")
    shown.add_column("contender")
    for column in (
        *("TTFT p50", "p90", "p99", "p50 by plain's", "p99", "prefill p50", "TBT p99", "req/s"),
        "computed",
        *("skipped", "read MB", "written MB", "failed", "differ"),
    ):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            row.contender,
            *(f"{each:.0f}" for each in (row.ttft_p50_ms, row.ttft_p90_ms, row.ttft_p99_ms)),
            f"{row.ttft_p50_ms / plain.ttft_p50_ms:.2f}",
            f"{row.ttft_p99_ms / plain.ttft_p99_ms:.2f}",
            f"{row.prefill_p50_ms:.0f}",
            f"{row.tbt_p99_ms:.1f}",
            f"{row.requests_per_s:.2f}",
            f"{row.computed_per_token:.3f}",
            str(row.skipped),
            f"{row.read_mb:.0f}",
            f"{row.written_mb:.0f}",
            str(row.failed),
            str(row.differ),
        )
    return shown


def cpu_table(rows: Sequence[Figures]) -> Table:
    """Seconds of CPU by kind of process, of one workload and topology."""
    parts = list(dict.fromkeys(part for row in rows for part in sorted(row.cpu_s)))
    shown = Table(title=f"{rows[-1].workload}, {rows[-1].topology}: CPU s")
    shown.add_column("contender")
    for part in (*parts, "all"):
        shown.add_column(part, justify="right")
    for row in rows:
        spent = [f"{row.cpu_s[part]:.1f}" if part in row.cpu_s else "" for part in parts]
        shown.add_row(row.contender, *spent, f"{sum(row.cpu_s.values()):.1f}")
    return shown


def verdicts(rows: Sequence[Figures]) -> list[tuple[bool, str]]:
    """Of one workload and topology: whether ours is first among peers in TTFT, by how much, and at
    what rate of requests. Pure."""
    ours = [row for row in rows if row.is_ours and not row.failed]
    peers = [row for row in rows if not row.is_ours and row.contender != PLAIN and not row.failed]
    plain = [row for row in rows if row.contender == PLAIN]
    if not ours or not peers:
        return []
    found = []
    kinds: dict[str, Callable[[Figures], float]] = {
        "p50": lambda row: row.ttft_p50_ms,
        "p99": lambda row: row.ttft_p99_ms,
    }
    for name, of in kinds.items():
        best, peer = min(ours, key=of), min(peers, key=of)
        line = f"TTFT {name}: {best.contender} {of(best):.0f} ms at {best.requests_per_s:.2f} req/s"
        for other in (peer, *plain):
            line += (
                f"; {other.contender} {of(other):.0f} ms, {of(other) / of(best):.2f} times that, "
                f"at {other.requests_per_s:.2f}"
            )
        found.append((of(best) <= of(peer), line))
    return found


def as_json(rows: Sequence[Figures], about: Mapping[str, Any]) -> dict[str, Any]:
    return {"about": dict(about), "rows": [asdict(row) for row in rows]}
