"""All metrics that an engine shows through vLLM, as one table.

Knows neither vLLM nor Prometheus: the engine's processes count by this table, the API server's
process makes Prometheus metrics of it, and docs/metrics.md is compared with it. A series travels
between them by its key, a plain text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ucm.config.settings import TIERS
from ucm.outcome import MISSED, RECOMPUTED, UNWRITTEN, Outcome

# Before the names of what a node cache counts of the far one of two tiers.
FAR = "far_"

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """`labels` names each label with all the values that it can have."""

    name: str
    kind: Kind
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()

    def series(self) -> Iterator[tuple[str, ...]]:
        """The label values of every series, in the order of `labels`."""
        return itertools.product(*self.labels.values())

    def key(self, values: tuple[str, ...]) -> str:
        """The series with these label values. Raises ValueError if there is none."""
        if len(values) != len(self.labels):
            raise ValueError(f"{self.name} has the labels {list(self.labels)}, not {values}")
        for (label, known), value in zip(self.labels.items(), values, strict=True):
            if value not in known:
                raise ValueError(f"{self.name}: {label} is never {value!r}, but one of {known}")
        if not values:
            return self.name
        pairs = ",".join(f'{label}="{v}"' for label, v in zip(self.labels, values, strict=True))
        return f"{self.name}{{{pairs}}}"


_QUEUES = (
    *("reads", "reads_overdue", "writes", "writes_overdue", "write_pages"),
    *("lookups", "finds", "far_write_pages"),
)


def _words(table: Sequence[Outcome]) -> tuple[str, ...]:
    return tuple(outcome.value for outcome in table)


_TIER = {"tier": tuple(stage.lower() for stage in TIERS), "op": ("read", "write")}
_LIMITS = {"limit": ("capacity", "quota")}
_OF_THE_NODE = "The node cache's own number, the same at all engines of the node"
_UNDER_WAY = "under way, waiting for the device included, summed over ranks"

_TABLE = (
    Metric(
        "ucm_handoff_promised_tokens",
        "counter",
        "Prompt tokens that receipts have promised to decode",
    ),
    Metric(
        "ucm_handoff_loaded_tokens",
        "counter",
        "Promised prompt tokens that decode has loaded",
    ),
    Metric(
        "ucm_handoff_recomputed_tokens",
        "counter",
        "Promised prompt tokens that decode computed all the same, by reason",
        {"reason": _words(RECOMPUTED)},
    ),
    Metric(
        "ucm_handoff_wait_seconds",
        "histogram",
        "How long a request waited at decode for what its receipt promised",
        buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    ),
    Metric(
        "ucm_receipts",
        "counter",
        "Receipts of finished prefills: issued here, or brought by requests and then",
        {"outcome": ("issued", "taken", "refused_namespace", "unreadable")},
    ),
    Metric(
        "ucm_hit_tokens",
        "counter",
        "Prompt tokens found in the store, by where their pages were",
        {"source": ("memory", "files")},
    ),
    Metric(
        "ucm_lookup_missed_blocks",
        "counter",
        "Full prompt blocks that a lookup did not get, by reason",
        {"reason": _words(MISSED)},
    ),
    Metric(
        "ucm_estimated_tokens_per_second",
        "gauge",
        "What load_policy auto goes by: how fast prompts are computed, and loaded from memory and"
        " from files",
        {"of": ("compute", "memory", "files")},
    ),
    Metric(
        "ucm_epochs", "counter", "Resets of the cache: what was stored before is not used again"
    ),
    Metric(
        "ucm_unnamed_requests",
        "counter",
        "Requests that go without the store, or from some block on, as what shapes their KV has no"
        " name",
        {"what": ("item", "adapter", "streamed", "timeout")},
    ),
    Metric("ucm_loaded_bytes", "counter", "Bytes copied to the device, summed over ranks"),
    Metric("ucm_load_seconds", "counter", f"Seconds with copies to the device {_UNDER_WAY}"),
    Metric("ucm_dumped_bytes", "counter", "Bytes copied from the device, summed over ranks"),
    Metric("ucm_dump_seconds", "counter", f"Seconds with copies from the device {_UNDER_WAY}"),
    Metric(
        "ucm_tier_bytes",
        "gauge",
        f"Bytes of pages read from and written to storage, ever. {_OF_THE_NODE}",
        _TIER,
    ),
    Metric(
        "ucm_tier_seconds",
        "gauge",
        "Seconds spent in it, summed over I/O threads, failed and fruitless calls included. "
        f"{_OF_THE_NODE}",
        _TIER,
    ),
    Metric(
        "ucm_tier_pages",
        "gauge",
        f"Pages of these bytes. {_OF_THE_NODE}",
        _TIER,
    ),
    Metric(
        "ucm_tier_errors",
        "gauge",
        f"Pages that were damaged, and calls that failed, ever. {_OF_THE_NODE}",
        _TIER,
    ),
    Metric(
        "ucm_node_promised_retries",
        "gauge",
        "Promised pages that storage failed to bring, or to tell of, and that it was asked for "
        f"again, ever. {_OF_THE_NODE}",
    ),
    Metric(
        "ucm_node_unwritten_pages",
        "gauge",
        f"Pages that did not get to storage when they were dumped, ever, by reason. {_OF_THE_NODE}",
        {"reason": _words(UNWRITTEN)},
    ),
    Metric(
        "ucm_node_unwritten_far_pages",
        "gauge",
        f"The same of the far one of two tiers. {_OF_THE_NODE}",
        {"reason": _words(UNWRITTEN)},
    ),
    Metric(
        "ucm_node_stalled",
        "gauge",
        "Backends of which half of the threads for this hang, and which are then done without. "
        f"{_OF_THE_NODE}",
        {"op": ("read", "write")},
    ),
    Metric("ucm_node_queue", "gauge", f"What waits there now. {_OF_THE_NODE}", {"queue": _QUEUES}),
    Metric(
        "ucm_node_slots",
        "gauge",
        f"Slots of the memory by state. {_OF_THE_NODE}",
        {"state": ("free", "filling", "ready", "aside")},
    ),
    Metric("ucm_node_pins", "gauge", f"Pins of slots that engines hold now. {_OF_THE_NODE}"),
    Metric(
        "ucm_node_evictions",
        "gauge",
        f"Pages evicted from memory, ever. {_OF_THE_NODE}",
    ),
    Metric(
        "ucm_node_stored_bytes",
        "gauge",
        "Bytes in storage, as far as they were counted, which of them are no pages and can't be "
        f"reclaimed, and how many there may be; 0 without a limit. {_OF_THE_NODE}",
        {"of": ("used", "other", "limit")},
    ),
    Metric(
        "ucm_node_reclaimed_files",
        "gauge",
        f"Files that this node has reclaimed, ever, by what their limit was. {_OF_THE_NODE}",
        _LIMITS,
    ),
    Metric(
        "ucm_node_reclaimed_bytes",
        "gauge",
        f"Bytes of these files. {_OF_THE_NODE}",
        _LIMITS,
    ),
    Metric("ucm_node_reclaim_seconds", "gauge", f"Seconds that runs took, ever. {_OF_THE_NODE}"),
    Metric(
        "ucm_node_refused_writes",
        "gauge",
        f"Attempts to write a page for which a limit left no room, ever. {_OF_THE_NODE}",
    ),
    Metric(
        "ucm_node_reclaim_leases",
        "gauge",
        f"Backends that this node is the one to reclaim. {_OF_THE_NODE}",
    ),
    Metric(
        "ucm_node_dropped_clients",
        "gauge",
        "Connections that it has ended for what came by them, or because its answers were not read,"
        f" ever. {_OF_THE_NODE}",
    ),
)

METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _TABLE}


def series_key(name: str, kind: Kind, labels: Mapping[str, str]) -> str:
    """The key of a series. Raises ValueError if the table has no such series of this kind."""
    metric = METRICS.get(name)
    if metric is None or metric.kind != kind:
        raise ValueError(f"there is no {kind} {name}")
    if labels.keys() != metric.labels.keys():
        raise ValueError(f"{name} has the labels {list(metric.labels)}, not {list(labels)}")
    return metric.key(tuple(labels[label] for label in metric.labels))
