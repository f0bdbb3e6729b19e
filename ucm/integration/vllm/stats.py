"""What the connector counts, on its way to vLLM's log line and metrics page.

    rank ─┐ take(), each step                       ┌─► reduce(): vLLM's log line
    rank ─┴─► aggregate ─► scheduler's process ─────┤   (API server's process)
    scheduler side ─► take() ─┘    a plain dict     └─► UcmPromMetrics ─► /metrics

`Counts` says what a plain dict of them is.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from ucm.integration.engine.counts import Counts, nothing
from ucm.metrics import METRICS, Metric

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class UcmStats(Counts, KVConnectorStats):
    """Counts as vLLM carries them."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__()
        if data is not None:
            self.add(data)  # a copy: vLLM gives one dict to several readers, and this one adds up

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def reset(self) -> None:
        self.data = nothing()

    def aggregate(self, other: KVConnectorStats) -> UcmStats:
        """Adds what another rank, the scheduler side or a later step has counted."""
        self.add(other.data)
        return self


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
