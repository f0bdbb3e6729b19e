"""What the engine asks of the node cache for its metrics, and what becomes of the answer."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.integration.scheduler_parts import Loopback
from ucm.integration.engine.gauges import PERIOD_S, NodeGauges
from ucm.integration.vllm.stats import UcmStats
from ucm.metrics import METRICS
from ucm.store.node import protocol as p


class FakeSession:
    """Takes what is sent, while it is ready."""

    def __init__(self) -> None:
        self.is_ready = True
        self.sent: list[p.ClientMessage] = []

    def send(self, message: p.ClientMessage) -> None:
        self.sent.append(message)


class Bench:
    """Gauges at a clock that the test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.session = FakeSession()
        self.stats = UcmStats()
        self.gauges = NodeGauges(self.session, self.stats, clock=lambda: self.now_s)

    def steps(self, *, until_s: float) -> int:
        """Steps every 10 ms. Returns how often it asked."""
        before = len(self.session.sent)
        while self.now_s < until_s:
            self.now_s += 0.01
            self.gauges.step()
        return len(self.session.sent) - before


def status(*, tier: str = "", far: str = "", **changes: dict[str, int]) -> p.Status:
    loopback = Loopback()
    answer = loopback.core.status(0, pid=1, arena="", check=True)
    fields = {name: {**getattr(answer, name), **more} for name, more in changes.items()}
    same = {f: getattr(answer, f) for f in answer.__struct_fields__}
    return p.Status(**{**same, **fields, "tier": tier, "far": far})


def test_it_asks_at_once_and_then_every_few_seconds() -> None:
    bench = Bench()

    assert bench.steps(until_s=100.1) == 1
    assert isinstance(bench.session.sent[0], p.GetStatus)
    assert bench.steps(until_s=100 + PERIOD_S - 0.1) == 0
    assert bench.steps(until_s=100 + 4 * PERIOD_S + 0.1) == 4


def test_it_asks_nothing_of_a_node_cache_that_is_not_ready() -> None:
    bench = Bench()
    bench.session.is_ready = False
    assert bench.steps(until_s=120) == 0

    bench.session.is_ready = True

    assert bench.steps(until_s=120.1) == 1


def test_a_status_sets_every_gauge_of_the_node() -> None:
    bench = Bench()
    totals = {
        "tier_read_bytes": 100,
        "tier_read_us": 2_500_000,
        "tier_read_pages": 10,
        "tier_read_errors": 1,
        "tier_write_bytes": 30,
        "tier_write_us": 4,
        "tier_write_pages": 3,
        "tier_write_errors": 0,
        "clients_dropped": 2,
        "promised_again": 4,
    }
    bench.gauges.on_status(
        status(
            queues={"write_pages": 7},
            slots={"free": 5, "pins": 3, "evictions": 8},
            counters=totals | {f"far_{name}": 2 * number for name, number in totals.items()},
            tier="posix",
            far="s3",
        )
    )

    gauges = bench.stats.data["gauges"]
    assert gauges['ucm_node_queue{queue="write_pages"}'] == 7
    assert gauges['ucm_node_slots{state="free"}'] == 5
    assert (gauges["ucm_node_pins"], gauges["ucm_node_evictions"]) == (3, 8)
    assert gauges["ucm_node_dropped_clients"] == 2
    assert gauges["ucm_node_promised_retries"] == 4
    assert gauges['ucm_tier_bytes{tier="posix",op="read"}'] == 100
    assert gauges['ucm_tier_bytes{tier="posix",op="write"}'] == 30
    assert gauges['ucm_tier_seconds{tier="posix",op="read"}'] == 2.5
    assert gauges['ucm_tier_errors{tier="posix",op="read"}'] == 1
    assert gauges['ucm_tier_pages{tier="s3",op="read"}'] == 20
    of_the_table = {
        metric.key(values)
        for metric in METRICS.values()
        if metric.kind == "gauge" and metric.name.startswith(("ucm_node_", "ucm_tier_"))
        for values in metric.series()
    }
    assert set(gauges) == of_the_table


def test_where_memory_is_all_there_is_nothing_is_said_of_storage() -> None:
    bench = Bench()
    bench.gauges.on_status(status())

    assert bench.stats.data["gauges"]
    assert not any(key.startswith("ucm_tier") for key in bench.stats.data["gauges"])


def test_the_table_has_every_queue_of_the_node_cache() -> None:
    assert set(METRICS["ucm_node_queue"].labels["queue"]) == set(Loopback().core.queues())
