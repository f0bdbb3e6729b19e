"""What the proxy counts, as Prometheus reads it. One registry per proxy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ucm.pd.fleet.pool import Pool, all_instances

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STATES = ("closed", "half-open", "open", "draining")


class ProxyMetrics:
    """Counters are the loop's thread's; `text` reads them there too."""

    def __init__(self, pools: Callable[[], Iterable[Pool]]) -> None:
        self._registry = CollectorRegistry()
        self.stage_s = Histogram(
            "ucm_pd_stage_seconds",
            "Time of a request in a stage: queue, prefill, decode_ttft, total",
            ["stage"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.requests = Counter(
            "ucm_pd_requests", "Requests by their path", ["path"], registry=self._registry
        )
        self.not_prefilled = Counter(
            "ucm_pd_not_prefilled",
            "Requests that decode got without a prefill before it, by reason",
            ["reason"],
            registry=self._registry,
        )
        self.retries = Counter(
            "ucm_pd_retries",
            "Legs that were sent to another instance, by role",
            ["role"],
            registry=self._registry,
        )
        self.withdrawn = Counter(
            "ucm_pd_withdrawn",
            "Decode legs that were begun anew because the prefill that they expected had failed",
            registry=self._registry,
        )
        self.failed = Counter(
            "ucm_pd_failed",
            "Requests that got no whole answer",
            ["reason"],
            registry=self._registry,
        )
        self.open_requests = Gauge(
            "ucm_pd_open_requests", "Requests in the proxy now", registry=self._registry
        )
        self._registry.register(_Instances(pools))

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Instances(Collector):
    """Read when asked: the pools know."""

    def __init__(self, pools: Callable[[], Iterable[Pool]]) -> None:
        self._pools = pools

    def collect(self) -> Iterator[Metric]:
        labels = ["role", "url"]
        state = GaugeMetricFamily(
            "ucm_pd_instance_state", "1 at the state it is in", labels=[*labels, "state"]
        )
        running = GaugeMetricFamily("ucm_pd_instance_running", "Requests there now", labels=labels)
        tokens = GaugeMetricFamily(
            "ucm_pd_instance_prompt_tokens", "Prompt tokens there now, guessed", labels=labels
        )
        queued = GaugeMetricFamily("ucm_pd_queued", "Requests that wait", labels=["role"])
        affinity = CounterMetricFamily(
            "ucm_pd_affinity",
            "Legs whose instance was chosen by their prompt's beginning, by what came of it",
            labels=["role", "outcome"],
        )
        for pool in self._pools():
            queued.add_metric([pool.role.value], pool.num_queued)
            counts = {} if pool.places is None else pool.places.counts
            for outcome, count in counts.items():
                affinity.add_metric([pool.role.value, outcome], count)
        for each in all_instances(self._pools()):
            where = [each.role.value, str(each.url)]
            for name in _STATES:
                state.add_metric([*where, name], float(each.state == name))
            running.add_metric(where, each.running)
            tokens.add_metric(where, each.tokens)
        yield from (state, running, tokens, queued, affinity)
