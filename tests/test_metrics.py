"""The table of the engine's metrics, and who may be in it."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from ucm.metrics import METRICS, Metric, series_key

EVERY = pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))


@EVERY
def test_a_name_is_one_that_prometheus_shows_unchanged(metric: Metric) -> None:
    """prometheus_client cuts `_total` off counters and makes names of its own of the others."""
    assert re.fullmatch(r"ucm_[a-z]+(_[a-z]+)*", metric.name)
    assert not metric.name.endswith(("_total", "_created", "_sum", "_count", "_bucket"))


@EVERY
def test_a_label_can_only_have_values_that_are_known(metric: Metric) -> None:
    values = [value for known in metric.labels.values() for value in known]

    assert all(re.fullmatch("[a-z]+[0-9]*(_[a-z]+)*", word) for word in [*metric.labels, *values])
    assert all(known for known in metric.labels.values())
    assert max(Counter(metric.series()).values()) == 1


@EVERY
def test_only_histograms_have_buckets_and_those_grow(metric: Metric) -> None:
    assert bool(metric.buckets) == (metric.kind == "histogram")
    assert sorted(set(metric.buckets)) == list(metric.buckets)


def test_every_series_has_a_key_of_its_own() -> None:
    keys = [metric.key(values) for metric in METRICS.values() for values in metric.series()]

    assert len(set(keys)) == len(keys) > len(METRICS)


def test_a_key_is_the_same_in_whatever_order_the_labels_are_given() -> None:
    one = series_key("ucm_tier_bytes", "gauge", {"tier": "posix", "op": "read"})

    assert one == 'ucm_tier_bytes{tier="posix",op="read"}'
    assert one == series_key("ucm_tier_bytes", "gauge", {"op": "read", "tier": "posix"})


@pytest.mark.parametrize(
    ("name", "kind", "labels"),
    [
        ("ucm_nothing", "counter", {}),
        ("ucm_epochs", "gauge", {}),
        ("ucm_epochs", "counter", {"reason": "late"}),
        ("ucm_hit_tokens", "counter", {}),
        ("ucm_hit_tokens", "counter", {"source": "tape"}),
        ("ucm_hit_tokens", "counter", {"source": "files", "more": "files"}),
    ],
)
def test_what_the_table_does_not_have_has_no_key(name, kind, labels) -> None:
    with pytest.raises(ValueError, match=name):
        series_key(name, kind, labels)
