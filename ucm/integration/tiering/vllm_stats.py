"""The tier's counts as vLLM's offloading carries them to its metrics page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingHistogramMetadata,
)

from ucm.integration.tiering.counts import TIERING_METRICS, TierCounts
from ucm.metrics import Metric

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
        OffloadingConnectorStats,
    )
    from vllm.v1.kv_offload.base import OffloadingMetricMetadata

_KINDS: Final[dict[str, Any]] = {
    "counter": OffloadingCounterMetadata,
    "gauge": OffloadingGaugeMetadata,
}


def definitions() -> dict[str, OffloadingMetricMetadata]:
    return {name: _definition(metric) for name, metric in TIERING_METRICS.items()}


def _definition(metric: Metric) -> OffloadingMetricMetadata:
    names = tuple(metric.labels)
    if metric.kind == "histogram":
        return OffloadingHistogramMetadata(metric.help, names, metric.buckets)
    made: OffloadingMetricMetadata = _KINDS[metric.kind](metric.help, names)
    return made


def stats_of(counts: TierCounts) -> OffloadingConnectorStats | None:
    """What was counted since the last time."""
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
        OffloadingConnectorStats,
    )

    numbers, observed = counts.take()
    if not numbers and not observed:
        return None
    stats = OffloadingConnectorStats()
    for series, number in numbers.items():
        if TIERING_METRICS[series.name].kind == "counter":
            stats.increase_counter(series.name, number, series.values)
        else:
            stats.set_gauge(series.name, number, series.values)
    for series, values in observed.items():
        for value in values:
            stats.observe_histogram(series.name, value, series.values)
    return stats
