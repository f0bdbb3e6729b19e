"""A producer never waits for its lookups, and loses nothing by that."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.integration.scheduler_parts import Engine, Loopback


def test_a_producer_whose_lookup_is_not_answered_before_the_request_ends_still_dumps():
    link = Loopback()
    engine = Engine(link, loads=False)
    request = engine.add("a", 64)
    link.mute = True
    assert engine.side.matched_tokens(request, 0) == (0, False)
    engine.side.allocated(request, engine.blocks(request), 0)
    engine.step({"a": 64})

    assert engine.side.finished(request, engine.blocks(request))[0]
    link.mute = False
    engine.step({})
    engine.copied(*engine.take_dumping())

    assert engine.step({}).released == ("a",)
    assert engine.slots()["ready"] == 4


def test_a_producer_dumps_only_what_the_store_lacks_and_never_loads():
    engine = Engine(Loopback(), loads=False)
    engine.prefill("a", 64)
    committed = engine.link.core.counters["dump_committed"]

    engine.prefill("b", 100)

    assert engine.link.core.counters["dump_committed"] - committed == 2
    assert engine.slots()["pins"] == 0
