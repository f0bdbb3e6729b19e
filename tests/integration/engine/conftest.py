"""Storage that engines of one test share."""

from __future__ import annotations

import pytest

from tests.store.tiers.memory_tier import MemoryTier


@pytest.fixture
def tier() -> MemoryTier:
    return MemoryTier()
