"""Before vLLM takes the memory of its KV cache away, no copy is under way that needs it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from tests.integration.copies.kv_layouts import page_in
from tests.integration.copies.simulated_device import SimulatedDevice
from tests.integration.rank_parts import GEOMETRY
from tests.integration.vllm.test_worker import Bench, job
from ucm.integration.vllm.metadata import StepMetadata
from ucm.integration.vllm.ucm_connector import UCMConnector


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(monkeypatch, can_sleep=request.param)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("bench", "tells"),
    [(True, False), (False, True)],
    indirect=["bench"],
    ids=["an engine that can sleep", "told before it sleeps"],
)
def test_no_copy_is_left_that_the_device_does_not_know(
    bench: Bench, tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM waits for the device, and only for that: a copy that is still in a lane's queue would
    touch memory that is gone. From 0.33 on it tells before; up to then any step may be the last."""
    bench.pin()
    page_in(bench.arena, GEOMETRY, 1).fill_(7)
    bench.write(3)
    issued = threading.Event()
    wait = SimulatedDevice.wait

    def slowly(self, event) -> None:
        if threading.current_thread().name.startswith("ucm-"):
            assert not issued.wait(0.3)
        wait(self, event)

    monkeypatch.setattr(SimulatedDevice, "wait", slowly)
    step = StepMetadata(dumps=(job(1, 0),), loads=(job(2, 1, (4, 5, 6, 7)),))
    bench.connector.handle_preemptions(step)
    bench.connector.bind_connector_metadata(step)
    bench.connector.start_load_kv(None)
    bench.connector.wait_for_save()
    if tells:
        bench.connector.unregister_kv_caches()
    bench.device.synchronize()
    real = [bench.device.real(t) for t in bench.rank.cache.layers]
    for tensor in real:
        assert bool((tensor[4:8] == 7).all())
        tensor.fill_(9)  # memory that is gone, or that somebody else has
    assert bench.until_ended(1, 2) == set()
    bench.device.synchronize()
    assert all(bool((tensor == 9).all()) for tensor in real)
    assert bool((page_in(bench.arena, GEOMETRY, 0) == 3).all())


@pytest.mark.parametrize("bench", [False], indirect=True, ids=["awake"])
def test_after_a_sleep_copies_find_the_same_addresses(bench: Bench) -> None:
    bench.pin()
    bench.connector.unregister_kv_caches()
    bench.connector.unregister_kv_caches()
    bench.write(5)
    step = StepMetadata(dumps=(job(1, 0),))
    bench.connector.bind_connector_metadata(step)
    bench.connector.wait_for_save()
    assert bench.until_ended(1) == set()
    assert bool((page_in(bench.arena, GEOMETRY, 0) == 5).all())


def test_vllm_is_told_that_it_may_sleep() -> None:
    assert UCMConnector.supports_sleep_mode(SimpleNamespace())
