"""What a metric is called on a metrics page."""

from __future__ import annotations

from ucm.metrics import Metric


def shown_as(metric: Metric) -> str:
    """prometheus_client adds a suffix to counters."""
    return f"{metric.name}_total" if metric.kind == "counter" else metric.name
