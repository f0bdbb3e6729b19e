"""Tests that need an accelerator, and of Python packages only torch, numpy and pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.gpu.caches import PAGES, MakeEngine
from tests.integration.copies.kv_layouts import Rank, make_arena
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.copy_engine import CopyEngine
from ucm.integration.copies.device import CopyLimits, DeviceCopyEngine
from ucm.store.blocks.page_layout import PageGeometry


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not torch.accelerator.is_available():
        pytest.skip("torch finds no accelerator")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


@pytest.fixture
def make(device: torch.device) -> Iterator[MakeEngine]:
    """Makes engines that are closed at the end. Their fences have patience with a cold device."""
    made: list[CopyEngine] = []

    def make_one(*ranks: Rank, fence_grace_s: float = 10.0) -> CopyEngine:
        made.append(
            DeviceCopyEngine(
                [rank.target() for rank in ranks],
                limits=CopyLimits(fence_grace_s=fence_grace_s),
            )
        )
        return made[-1]

    yield make_one
    for engine in made:
        engine.close()


@pytest.fixture(params=["registered", "ring"])
def new_arena(
    request: pytest.FixtureRequest, device: torch.device
) -> Iterator[Callable[[PageGeometry], Arena]]:
    """Makes arenas of PAGES pages, which are closed at the end."""
    made: list[Arena] = []

    def new(geometry: PageGeometry) -> Arena:
        arena = make_arena(PAGES, geometry, device)
        made.append(arena)
        if request.param == "registered":
            half = arena.bytes.numel() // 2 // 4096 * 4096
            arena.prepare(0, half)  # as spans come into use
            arena.prepare(0, arena.bytes.numel())
            if device.type == "cuda":
                assert all(piece.pinned for piece in arena.pieces(0, arena.bytes.numel()))
        return arena

    yield new
    for arena in made:
        assert arena.close()
