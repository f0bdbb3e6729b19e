"""What a tier counts, beside what vLLM counts of it: a table, and the numbers since the last take.

The node cache's own numbers are those of every door (`ucm/metrics.py`).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from ucm.metrics import METRICS, Metric
from ucm.outcome import MISSED, Outcome, missed_as

_REASONS: Final = tuple(outcome.value for outcome in MISSED)

_TABLE: Final = (
    Metric(
        "ucm_tiering_asked_rows",
        "counter",
        "Rows that requests have asked for and vLLM's host memory did not have, by answer",
        {"answer": ("found", "absent", "late", "bypassed")},
    ),
    Metric("ucm_tiering_loaded_rows", "counter", "Rows copied to vLLM's host memory"),
    Metric(
        "ucm_tiering_lost_rows",
        "counter",
        "Rows that were found and could not be loaded, by reason",
        {"reason": _REASONS},
    ),
    Metric(
        "ucm_tiering_stored_rows",
        "counter",
        "Rows that are in the node cache after a job of vLLM's",
    ),
    Metric(
        "ucm_tiering_dropped_rows",
        "counter",
        "Rows that the node cache has not taken in their time",
    ),
    Metric(
        "ucm_tiering_promises",
        "counter",
        "Hand-offs: receipts issued here, and what requests have brought",
        {"outcome": (*("issued", "kept", "late", "refused_namespace", "other_prompt", "crowded"),)},
    ),
    Metric(
        "ucm_tiering_wait_seconds",
        "histogram",
        "How long a request has waited for what was promised",
        buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    ),
)
TIERING_METRICS: Final[Mapping[str, Metric]] = {
    **{metric.name: metric for metric in _TABLE},
    **{
        name: metric
        for name, metric in METRICS.items()
        if name.startswith(("ucm_node_", "ucm_tier_"))
    },
}


class Series(NamedTuple):
    """Of a metric, by its name, that with these values of its labels."""

    name: str
    values: tuple[str, ...]


class TierCounts:
    """From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: defaultdict[Series, float] = defaultdict(float)
        self._observed: defaultdict[Series, list[float]] = defaultdict(list)

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        if by:
            with self._lock:
                self._numbers[_series(name, labels)] += by

    def gauge(self, name: str, value: float, **labels: str) -> None:
        with self._lock:
            self._numbers[_series(name, labels)] = value

    def observe(self, name: str, value: float) -> None:
        with self._lock:
            self._observed[_series(name, {})].append(value)

    def take(self) -> tuple[dict[Series, float], dict[Series, list[float]]]:
        with self._lock:
            taken = (dict(self._numbers), dict(self._observed))
            self._numbers.clear()
            self._observed.clear()
        return taken


def lost_as(reason: Outcome | None) -> str:
    """A row without a reason was not come to in time."""
    return missed_as(reason if reason is not None else Outcome.TIMEOUT).value


def _series(name: str, labels: Mapping[str, Any]) -> Series:
    metric = TIERING_METRICS[name]
    values = tuple(labels[label] for label in metric.labels)
    metric.key(values)  # raises ValueError for what the table does not have
    return Series(name, values)
