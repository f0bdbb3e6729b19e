"""What metrics are called on a metrics page, and which labels they have there."""

from __future__ import annotations

from ucm.metrics import METRICS, Metric
from ucm.pd.metrics import ProxyMetrics

# Labels that Prometheus or vLLM adds.
COMMON_LABELS = {"job", "instance", "le", "model_name", "engine"}


def shown_as(metric: Metric) -> str:
    """prometheus_client adds a suffix to counters."""
    return f"{metric.name}_total" if metric.kind == "counter" else metric.name


def proxy_metrics() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name on the page -> kind and labels, of everything that the proxy has."""
    found = {}
    for collector in ProxyMetrics(lambda: ())._registry._collector_to_names:
        for family in collector.collect():
            # A collector of its own makes families that know their labels.
            labels = getattr(collector, "_labelnames", getattr(family, "_labelnames", ()))
            name = f"{family.name}_total" if family.type == "counter" else family.name
            found[name] = (family.type, tuple(labels))
    return found


def labels_of() -> dict[str, set[str]]:
    """Labels of every name that can be asked for."""
    known: dict[str, set[str]] = {}
    engine = {shown_as(m): (m.kind, tuple(m.labels)) for m in METRICS.values()}
    for name, (kind, labels) in {**engine, **proxy_metrics()}.items():
        ends = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        for end in ends:
            known[name + end] = set(labels) | COMMON_LABELS
    return known
