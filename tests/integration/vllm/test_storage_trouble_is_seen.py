"""Storage that can't be written leaves a trace where people look: the engine's log and metrics."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.integration.engine.test_receipts_of_unsaved_pages import Disk, disk_of
from tests.integration.scheduler_parts import BLOCK, Engine, Loopback
from ucm.metrics import series_key
from ucm.outcome import Outcome
from ucm.store.node import protocol as p


def gauge(engine: Engine, name: str, **labels: str) -> float:
    gauges: dict[str, Any] = engine.stats.data["gauges"]
    return float(gauges[series_key(name, "gauge", labels)])


def ask_for_gauges(engine: Engine) -> None:
    engine.side._gauges.on_status(engine.link.core.status(1, pid=1, arena="", check=False))


@pytest.mark.parametrize("reason", ["full", "io_error", "timeout"])
def test_what_storage_refuses_is_in_the_log_of_the_engine_and_in_its_metrics(
    reason: Outcome, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(Loopback(tier=Disk()))
    disk_of(engine).refuses = reason

    engine.prefill("a", 4 * BLOCK)
    engine.step({})
    ask_for_gauges(engine)

    assert gauge(engine, "ucm_node_unwritten_pages", reason=reason) == 1
    assert gauge(engine, "ucm_node_unwritten_pages", reason="after_failed") == 3
    said = [each for each in caplog.records if each.name.endswith("client.session")]
    (line,) = [each.getMessage() for each in said]
    assert "the disk takes nothing" in line
    assert "/nowhere.log" in line


def test_trouble_that_lasts_is_not_said_with_each_page(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(Loopback(tier=Disk()))
    disk_of(engine).refuses = "full"
    for i in range(20):
        engine.prefill(f"r{i}", (i + 1) * BLOCK)
        engine.link.now_s += 2
    engine.step({})

    said = [each for each in caplog.records if each.name.endswith("client.session")]
    assert len(said) == 1


def test_only_scheduler_sides_are_sent_notices() -> None:
    link = Loopback(tier=Disk())
    inbox: list[p.NodeMessage] = []
    hello = p.Hello(version=p.VERSION, session="s", role="worker", pid=1)
    link.core.connect(hello, inbox.append)
    engine = Engine(link)
    disk_of(engine).refuses = "full"

    engine.prefill("a", 4 * BLOCK)

    assert not [each for each in inbox if isinstance(each, (p.Notice, p.SavingNews))]


def test_a_node_cache_that_is_silent_is_in_the_log_of_the_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine(Loopback(), timeout_ms=1)
    for i in range(3):
        engine.link.mute = True
        request = engine.add(f"r{i}", (i + 1) * BLOCK)
        while engine.side.matched_tokens(request, 0)[0] is None:
            pass
        engine.link.mute = False
        engine.step({})

    said = [each.getMessage() for each in caplog.records if "does not answer" in each.getMessage()]
    assert len(said) == 1
    assert "/nowhere.log" in said[0]
