"""When and how the node cache's memory is pinned: never in an engine's way."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("vllm")

import torch

from tests.integration.copies.copy_engines import HEADS
from tests.integration.copies.kv_layouts import make_arena
from tests.integration.copies.simulated_device import SimulatedDevice
from ucm.integration.copies import generations as memories_module
from ucm.integration.copies import pinning
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.generations import Memories
from ucm.store.node import protocol as p

CAPACITY_BYTES = 10 << 20
PIECE_BYTES = 1 << 20


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    device = SimulatedDevice()
    yield device
    device.close()


@pytest.fixture
def memories(device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[Memories]:
    """Of a rank on an accelerator."""
    monkeypatch.setattr(memories_module, "Arena", functools.partial(Arena, registrar=device))
    monkeypatch.setattr(pinning, "_MIN_PAUSE_S", 0.0)
    made = Memories(torch.device("cuda", 0), pin_piece_bytes=PIECE_BYTES)
    made._preparer._first_retry_s = made._preparer._retry_s = 0.02
    fd = os.memfd_create("slots")
    os.ftruncate(fd, CAPACITY_BYTES)
    made.memory_arrived(
        0, fd, p.Welcome(version=p.VERSION, arena="a", capacity_bytes=CAPACITY_BYTES, pid=1)
    )
    os.close(fd)
    yield made
    made.close()
    made._preparer.join(30)
    assert not made._preparer.is_alive()


def arena_of(memories: Memories) -> Arena:
    return memories._arenas[0]


def pinned_bytes(memories: Memories) -> int:
    pieces = arena_of(memories).pieces(0, CAPACITY_BYTES)
    return sum(piece.nbytes for piece in pieces if piece.pinned)


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_nothing_is_pinned_before_the_first_step_which_is_after_the_capture_of_graphs(
    memories: Memories, device: SimulatedDevice
) -> None:
    """Although the node cache has said long before which of its memory is in use."""
    device.capturing = True
    memories.memory_in_use(0, 0, CAPACITY_BYTES)
    time.sleep(0.2)
    assert not device.capture_spoiled
    device.capturing = False
    assert pinned_bytes(memories) == 0
    memories.first_step()

    eventually(lambda: pinned_bytes(memories) == CAPACITY_BYTES)
    assert not device.capture_spoiled


def test_memory_is_pinned_in_small_pieces_by_one_thread(
    memories: Memories, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much is announced at once, and however often: a rank that comes late hears of tens of
    GB, and a registration keeps the process's other calls into the driver out."""
    threads: set[threading.Thread] = set()
    register = device.register

    def note(address: int, nbytes: int) -> str:
        threads.add(threading.current_thread())
        return register(address, nbytes)

    monkeypatch.setattr(device, "register", note)
    memories.first_step()
    memories.memory_in_use(0, 0, 3 << 20)
    memories.memory_in_use(0, 0, CAPACITY_BYTES)
    memories.memory_in_use(0, 5 << 20, 4 << 20)

    eventually(lambda: pinned_bytes(memories) == CAPACITY_BYTES)
    assert threads == {memories._preparer}
    assert device.calls == ["register 1048576"] * 10


def test_what_was_refused_is_pinned_later(
    memories: Memories, device: SimulatedDevice, caplog: pytest.LogCaptureFixture
) -> None:
    """A refusal is about its moment, and says so itself: no limit is blamed that may be fine."""
    device.refuses = True
    memories.first_step()
    memories.memory_in_use(0, 0, CAPACITY_BYTES)
    eventually(lambda: len(caplog.records) > 0)
    time.sleep(0.2)
    assert pinned_bytes(memories) == 0
    device.refuses = False

    eventually(lambda: pinned_bytes(memories) == CAPACITY_BYTES)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "error 2: out of memory" in warning
    assert "ulimit" not in warning


def test_a_capture_while_the_engine_serves_costs_one_try(
    memories: Memories, device: SimulatedDevice
) -> None:
    memories.first_step()
    device.capturing = True
    memories.memory_in_use(0, 0, CAPACITY_BYTES)
    eventually(lambda: device.capture_spoiled)
    device.capturing = False

    eventually(lambda: pinned_bytes(memories) == CAPACITY_BYTES)


def test_whatever_a_registration_raises_the_rest_is_pinned(
    memories: Memories, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories.first_step()
    with monkeypatch.context() as patch:
        patch.setattr(device, "register", raise_error)
        memories.memory_in_use(0, 0, CAPACITY_BYTES)
        time.sleep(0.1)

    eventually(lambda: pinned_bytes(memories) == CAPACITY_BYTES)


def raise_error(address: int, nbytes: int) -> str:
    raise RuntimeError("CUDA driver error")


def test_memory_of_a_node_cache_that_is_gone_is_not_pinned_any_more(
    memories: Memories, device: SimulatedDevice
) -> None:
    device.refuses = True
    memories.first_step()
    memories.memory_in_use(0, 0, CAPACITY_BYTES)
    arena = arena_of(memories)
    memories.planned_from(1)
    eventually(lambda: arena.closed)
    device.refuses = False
    time.sleep(0.2)

    assert device._registered == {}


def test_pinning_can_be_turned_off(device: SimulatedDevice) -> None:
    preparer = pinning.Preparer(pins=True, piece_bytes=0)
    preparer.start()
    preparer.allow()
    arena = device.arena(1, HEADS)
    preparer.add(arena, 0, arena.bytes.numel())
    preparer.stop()
    preparer.join(30)
    assert device._registered == {}


def test_on_the_cpu_memory_is_prepared_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared: list[tuple[int, int]] = []
    monkeypatch.setattr(
        Arena, "prepare", lambda self, start, nbytes: prepared.append((start, nbytes)) or ""
    )
    preparer = pinning.Preparer(pins=False)
    preparer.start()
    arena = make_arena(2, HEADS)
    preparer.add(arena, 0, arena.bytes.numel())
    eventually(lambda: prepared == [(0, arena.bytes.numel())])
    preparer.stop()
    preparer.join(30)
