from __future__ import annotations

import pytest

from tests.store.tiers.memory_tier import MemoryTier
from tests.store.tiers.tier_contract import TierContract
from ucm.store.tiers.tier import Tier


class TestMemoryTier(TierContract):
    @pytest.fixture
    def tier(self) -> Tier:
        return MemoryTier()
