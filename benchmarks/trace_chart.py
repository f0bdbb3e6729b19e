"""Draws what trace.py has written with --json: TTFT by share of requests, for each workload.

python benchmarks/trace_chart.py FOUND.json CHART.svg
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PANEL_INCHES = (7.0, 4.2)
TITLE_CHARACTERS = 100


def draw(found: dict[str, Any], target: Path) -> None:
    rows = found["rows"]
    # vLLM alone has no topology: it is in all of a workload.
    panels = list(
        dict.fromkeys((row["topology"], row["workload"]) for row in rows if row["topology"])
    )
    width, height = PANEL_INCHES
    figure, all_axes = plt.subplots(
        len(panels), 1, figsize=(width, height * len(panels)), squeeze=False
    )
    for axes, (topology, workload) in zip(all_axes[:, 0], panels, strict=True):
        for row in rows:
            if row["workload"] == workload and row["topology"] in ("", topology):
                _line(axes, row)
        axes.set_title(f"{workload}, {topology}")
        axes.set_xlabel("share of requests")
        axes.set_ylabel("TTFT, ms")
        axes.set_yscale("log")
        axes.set_xlim(0.0, 1.0)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    title = textwrap.fill(found["about"]["line"], TITLE_CHARACTERS)
    figure.suptitle(title, fontsize="x-small")
    figure.tight_layout()
    figure.savefig(target)


def _line(axes: Any, row: dict[str, Any]) -> None:
    times_ms = sorted(row["ttft_ms"])
    shares = [place / len(times_ms) for place in range(len(times_ms) + 1)]
    style = {"linewidth": 2.2} if row["is_ours"] else {"linewidth": 1.2, "linestyle": "--"}
    # A request's time is drawn over its own share.
    axes.step(shares, [*times_ms, times_ms[-1]], where="post", label=row["contender"], **style)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
