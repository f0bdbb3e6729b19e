"""Draws what trace.py has written with --json: TTFT by share of requests, for each workload.

python benchmarks/trace_chart.py FOUND.json CHART.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PANEL_INCHES = (7.0, 4.2)


def draw(found: dict[str, Any], target: Path) -> None:
    rows = found["rows"]
    panels = list(dict.fromkeys((row["topology"], row["workload"]) for row in rows))
    width, height = PANEL_INCHES
    figure, all_axes = plt.subplots(
        len(panels), 1, figsize=(width, height * len(panels)), squeeze=False
    )
    for axes, (topology, workload) in zip(all_axes[:, 0], panels, strict=True):
        for row in rows:
            if (row["topology"], row["workload"]) == (topology, workload):
                _line(axes, row)
        axes.set_title(f"{workload}, {topology}")
        axes.set_xlabel("share of requests")
        axes.set_ylabel("TTFT, ms")
        axes.set_yscale("log")
        axes.set_xlim(0.0, 1.0)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    figure.suptitle(found["about"]["line"], fontsize="small")
    figure.tight_layout(rect=(0.0, 0.0, 1.0, 0.98))
    figure.savefig(target)


def _line(axes: Any, row: dict[str, Any]) -> None:
    times_ms = sorted(row["ttft_ms"])
    shares = [(place + 1) / len(times_ms) for place in range(len(times_ms))]
    style = {"linewidth": 2.2} if row["is_ours"] else {"linewidth": 1.2, "linestyle": "--"}
    axes.step(shares, times_ms, where="pre", label=row["contender"], **style)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
