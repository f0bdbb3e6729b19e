"""What the node cache says of itself, as gauges of the engine.

The node cache has no metrics page. Every engine of a node shows the same totals, under its own
label.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from ucm.metrics import FAR, METRICS
from ucm.outcome import UNWRITTEN
from ucm.store.node import protocol as p

PERIOD_S = 5.0
_MICROSECOND_S = 1e-6


class StatusSource(Protocol):
    """Of a `NodeSession` what is needed here."""

    @property
    def is_ready(self) -> bool: ...

    def send(self, message: p.ClientMessage) -> None: ...


class GaugeBook(Protocol):
    """Of `Counts` what is needed here."""

    def gauge(self, name: str, value: float, **labels: str) -> None: ...


class NodeGauges:
    """Asks for a status every few seconds while the engine steps; the answer comes later."""

    def __init__(
        self,
        session: StatusSource,
        stats: GaugeBook,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._stats = stats
        self._clock = clock
        self._ask_at_s = clock()

    def step(self) -> None:
        now_s = self._clock()
        if now_s >= self._ask_at_s and self._session.is_ready:
            self._ask_at_s = now_s + PERIOD_S
            self._session.send(p.GetStatus(id=0))

    def on_status(self, status: p.Status) -> None:
        gauge = self._stats.gauge
        for queue in METRICS["ucm_node_queue"].labels["queue"]:
            gauge("ucm_node_queue", status.queues[queue], queue=queue)
        for state in METRICS["ucm_node_slots"].labels["state"]:
            gauge("ucm_node_slots", status.slots[state], state=state)
        gauge("ucm_node_pins", status.slots["pins"])
        gauge("ucm_node_evictions", status.slots["evictions"])
        gauge("ucm_node_dropped_clients", status.counters.get("clients_dropped", 0))
        gauge("ucm_node_promised_retries", status.counters.get("promised_again", 0))
        for reason in UNWRITTEN:
            gauge("ucm_node_unwritten_pages", status.unwritten(reason), reason=reason)
            gauge("ucm_node_unwritten_far_pages", status.unwritten(reason, FAR), reason=reason)
        for op in METRICS["ucm_node_stalled"].labels["op"]:
            gauge("ucm_node_stalled", status.slots[f"{op}s_stalled"], op=op)
        self._show_reclaim(status.counters)
        # Memory may be all there is.
        for tier, of in ((status.tier, ""), (status.far, FAR)):
            for op in METRICS["ucm_tier_bytes"].labels["op"] if tier else ():
                seconds = status.counters[f"{of}tier_{op}_us"] * _MICROSECOND_S
                gauge("ucm_tier_seconds", seconds, tier=tier, op=op)
                for what in ("bytes", "pages", "errors"):
                    number = status.counters[f"{of}tier_{op}_{what}"]
                    gauge(f"ucm_tier_{what}", number, tier=tier, op=op)

    def _show_reclaim(self, counters: Mapping[str, int]) -> None:
        gauge = self._stats.gauge
        stored = {
            "used": "stored_bytes",
            "other": "stored_other_bytes",
            "limit": "stored_limit_bytes",
        }
        for of, counter in stored.items():
            gauge("ucm_node_stored_bytes", counters.get(counter, 0), of=of)
        for limit in METRICS["ucm_node_reclaimed_files"].labels["limit"]:
            for what in ("files", "bytes"):
                number = counters.get(f"reclaimed_{what}_{limit}", 0)
                gauge(f"ucm_node_reclaimed_{what}", number, limit=limit)
        gauge("ucm_node_reclaim_seconds", counters.get("reclaim_us", 0) * _MICROSECOND_S)
        gauge("ucm_node_refused_writes", counters.get("reclaim_refused_writes", 0))
        gauge("ucm_node_reclaim_leases", counters.get("reclaim_leases", 0))
