from __future__ import annotations

import pytest

from tests.store.tier_contract import TierContract
from ucm.store.tiers.tier import MemoryTier, Tier


class TestMemoryTier(TierContract):
    @pytest.fixture
    def tier(self) -> Tier:
        return MemoryTier()
