"""What the connector counts, on its way to vLLM's log line and metrics page.

    rank ─┐ take(), each step                       ┌─► reduce(): vLLM's log line
    rank ─┴─► aggregate ─► scheduler's process ─────┤   (API server's process)
    scheduler side ─► take() ─┘    a plain dict     └─► UcmPromMetrics ─► /metrics

ucm/metrics.py says what there is to count. Nothing here is thread-safe: in each process one thread
counts and takes.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from ucm.metrics import METRICS, Metric, series_key

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Values of one histogram that travel one by one: Prometheus takes them no other way. The step that
# has more is not known yet.
MAX_VALUES = 1000
_MB = 1_000_000


def _nothing() -> dict[str, Any]:
    return {"counters": {}, "gauges": {}, "histograms": {}}


class UcmStats(KVConnectorStats):
    """What was counted since the last `take`. `data` has plain types only, as it is sent:

    counters    key of the series -> what came on top
    gauges      key of the series -> the last value
    histograms  name -> `values`, at most MAX_VALUES of them, and how many `more` there were, which
                then count as the last of the values
    """

    data: dict[str, Any]

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=_nothing())
        if data is not None:
            self._add(data)  # a copy: vLLM gives one dict to several readers, and this one adds up

    # -- counting ----------------------------------------------------------------------------

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Raises ValueError for what the table does not have: a mistake in the code."""
        if by < 0:
            raise ValueError(f"{name} can't be counted by {by}")
        key = series_key(name, "counter", labels)
        if by:
            counters = self.data["counters"]
            counters[key] = counters.get(key, 0) + by

    def gauge(self, name: str, value: float, **labels: str) -> None:
        self.data["gauges"][series_key(name, "gauge", labels)] = value

    def observe(self, name: str, value: float) -> None:
        self._observe(series_key(name, "histogram", {}), [value], 0)

    def take(self) -> UcmStats | None:
        """What was counted since the last time; None if that is nothing."""
        if self.is_empty():
            return None
        taken = UcmStats()
        taken.data, self.data = self.data, taken.data
        return taken

    # -- what vLLM asks ----------------------------------------------------------------------

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def reset(self) -> None:
        self.data = _nothing()

    def aggregate(self, other: KVConnectorStats) -> UcmStats:
        """Adds what another rank, the scheduler side or a later step has counted."""
        self._add(other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """A few numbers for people: sums over all labels, and of the node what may grow."""
        reduced: dict[str, int | float] = {}
        for name, metric in METRICS.items():
            short = name.removeprefix("ucm_")
            if metric.kind == "counter" and (total := self._sum(metric)):
                if short.endswith("_bytes"):
                    short, total = short.replace("_bytes", "_mb"), total / _MB
                reduced[short] = round(total, 3)
        for name, told in self.data["histograms"].items():
            count = len(told["values"]) + told["more"]
            total = sum(told["values"]) + told["values"][-1] * told["more"]
            reduced[f"{name.removeprefix('ucm_')}_mean"] = round(total / count, 3)
        for queue in ("reads", "write_pages"):
            key = series_key("ucm_node_queue", "gauge", {"queue": queue})
            if key in self.data["gauges"]:
                reduced[f"node_{queue}"] = self.data["gauges"][key]
        return reduced

    # -- parts of it -------------------------------------------------------------------------

    def _add(self, data: dict[str, Any]) -> None:
        counters = self.data["counters"]
        for key, value in data["counters"].items():
            counters[key] = counters.get(key, 0) + value
        self.data["gauges"].update(data["gauges"])
        for name, told in data["histograms"].items():
            self._observe(name, told["values"], told["more"])

    def _observe(self, name: str, values: list[float], more: int) -> None:
        told = self.data["histograms"].setdefault(name, {"values": [], "more": 0})
        room = MAX_VALUES - len(told["values"])
        told["values"] += values[:room]
        told["more"] += len(values[room:]) + more

    def _sum(self, metric: Metric) -> float:
        counters: dict[str, float] = self.data["counters"]
        return sum(counters.get(metric.key(values), 0) for values in metric.series())


# Of the last UcmPromMetrics in this process.
_shown: list[Any] = []


class UcmPromMetrics(KVConnectorPromMetrics):
    """The table as Prometheus metrics, for all engines of one API server. All series are there from
    the start, at 0: a rate over one that appears with its first event misses that event."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _hide_earlier()
        self._series: dict[tuple[int, str], Any] = {}
        for metric in METRICS.values():
            shown = self._make(metric)
            _shown.append(shown)
            for engine, engine_values in per_engine_labelvalues.items():
                for values in metric.series():
                    self._series[engine, metric.key(values)] = shown.labels(*engine_values, *values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Shows what one engine has counted. What this process doesn't know is left out: an engine
        on another machine may have a later table, and vLLM ends at an error in here."""
        told = transfer_stats_data
        for key, value in told["counters"].items():
            if series := self._series.get((engine_idx, key)):
                series.inc(value)
        for key, value in told["gauges"].items():
            if series := self._series.get((engine_idx, key)):
                series.set(value)
        for name, histogram in told["histograms"].items():
            if series := self._series.get((engine_idx, name)):
                values = histogram["values"]
                for value in [*values, *values[-1:] * histogram["more"]]:
                    series.observe(value)

    def _make(self, metric: Metric) -> Any:
        names = {
            "name": metric.name,
            "documentation": metric.help,
            "labelnames": [*self._labelnames, *metric.labels],
        }
        if metric.kind == "counter":
            return self._counter_cls(**names)
        if metric.kind == "gauge":
            # With several API servers each has a part of the steps: the latest value is right.
            return self._gauge_cls(**names, multiprocess_mode="mostrecent")
        return self._histogram_cls(**names, buckets=list(metric.buckets))


def _hide_earlier() -> None:
    """vLLM makes its metrics anew for every engine client of a process, and drops the earlier ones
    from the registry by the prefix of its own names."""
    while _shown:
        # Ray's metrics are in no registry.
        with suppress(KeyError):
            REGISTRY.unregister(_shown.pop())
