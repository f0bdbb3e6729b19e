"""What a device, or a mistake of ours, may do to the copies: every job ends, and says how."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.integration.copies.copy_engines import DUMP, HEADS, LOAD, copy_and_wait
from tests.integration.copies.kv_layouts import page_in, page_of_blocks, wait_for, whole_pages
from tests.integration.copies.simulated_device import SimulatedDevice
from tests.integration.copies.test_asynchronous_device import Machine
from ucm.integration.copies.copy_engine import CopyEngine
from ucm.integration.copies.job_ledger import JobLedger
from ucm.integration.copies.jobs import Direction


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    for engine in machine.engines:
        engine.close()
    machine.device.close()


def ended(engine: CopyEngine, *job_ids: int) -> list[int]:
    """Waits for these jobs' ends; those that failed."""
    named: list[int] = []
    deadline = time.monotonic() + 30
    while len(named) < len(job_ids) and time.monotonic() < deadline:
        named += engine.finished()
    assert sorted(job_ids) == sorted(named)
    return sorted(engine.failed())


def test_a_device_that_refuses_to_answer_for_a_while_has_not_lost_the_copies(
    machine: Machine,
) -> None:
    """As it does while a graph is captured. The slots stay held until it has answered."""
    rank = machine.rank("LBHNC", seed=1)
    arena = machine.arena(1)
    engine = machine.engine(rank)
    forward_ends = threading.Event()
    machine.device.launch(forward_ends.wait)
    machine.device.failing = True
    engine.submit(1, DUMP, whole_pages(rank, [(3,)]), arena)
    time.sleep(0.3)
    assert engine.finished() == []
    assert not arena.close(timeout_s=0.01)
    machine.device.failing = False
    forward_ends.set()
    wait_for(engine, 1)

    assert torch.equal(page_of_blocks(rank.cache.read(), [3]), page_in(arena, HEADS, 0))


def test_jobs_of_a_device_that_has_failed_for_long_end_as_failed(machine: Machine) -> None:
    rank = machine.rank("LBHNC", seed=1)
    arena = machine.arena(1)
    engine = machine.engine(rank, hold_s=0.3)
    machine.device.failing = True
    for job in range(3):
        engine.submit(job, LOAD, whole_pages(rank, [(3,)]), arena)
    assert [0, 1, 2] == ended(engine, 0, 1, 2)
    assert arena.close(timeout_s=0)


@pytest.mark.parametrize("name", ["use_own_stream", "record"])
def test_whatever_a_lane_meets_its_jobs_end_as_failed_and_it_goes_on(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also what no submission catches, and errors that nobody has thought of."""
    rank = machine.rank("LBHNC", seed=1)
    arena = machine.arena(1)
    engine = machine.engine(rank, hold_s=0.2)
    engine.order_after_forward()
    with monkeypatch.context() as patch:
        patch.setattr(SimulatedDevice, name, raise_strange_error)
        for job in range(3):
            engine.submit(job, DUMP, whole_pages(rank, [(3,)]), arena)
        assert [0, 1, 2] == ended(engine, 0, 1, 2)
    engine.fence([0, 1, 2])
    copy_and_wait(engine, DUMP, whole_pages(rank, [(3,)]), arena)
    assert torch.equal(page_of_blocks(rank.cache.read(), [3]), page_in(arena, HEADS, 0))
    assert arena.close(timeout_s=0)


def raise_strange_error(*args: object) -> None:
    raise KeyError("an error that nobody has thought of")


@pytest.mark.parametrize("direction", Direction)
def test_a_job_whose_end_goes_wrong_ends_all_the_same(
    machine: Machine, direction: Direction, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = machine.rank("LBHNC", seed=1)
    arena = machine.arena(1)
    engine = machine.engine(rank)
    monkeypatch.setattr(arena, "release", raise_strange_error)
    engine.submit(1, direction, whole_pages(rank, [(3,)]), arena)
    engine.submit(2, direction, whole_pages(rank, [(3,)]), arena)
    ended(engine, 1, 2)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()), max_size=40))
def test_however_often_and_in_whatever_order_layers_come_a_job_ends_once(
    calls: list[tuple[int, int, bool]],
) -> None:
    """A layer that is submitted twice is copied once, one that ends twice has ended once, and a job
    has ended when each of its layers has."""
    ledger = JobLedger()
    begun: set[tuple[int, int]] = set()
    over: dict[int, set[int]] = {}
    named: list[int] = []
    for job_id, layer, ends in calls:
        is_over = len(over.get(job_id, ())) == 3
        if not ends:
            may_copy = ledger.begin(job_id, DUMP, layer, of=range(3))
            assert may_copy == ((job_id, layer) not in begun and not is_over)
            begun.add((job_id, layer))
        else:
            ledger.close_one(job_id, layer, ok=True)
            if any(other == job_id for other, _ in begun):
                over.setdefault(job_id, set()).add(layer)
    named += ledger.take_ended()
    assert sorted(job_id for job_id, layers in over.items() if len(layers) == 3) == sorted(named)
