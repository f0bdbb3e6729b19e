"""Fixtures of the copy tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.copies.copy_engines import ENGINES, MakeEngine
from tests.integration.copies.kv_layouts import Rank
from ucm.integration.copies.copy_engine import CopyEngine


@pytest.fixture(params=list(ENGINES))
def make(request: pytest.FixtureRequest) -> Iterator[MakeEngine]:
    """Makes engines that are closed at the end."""
    made: list[CopyEngine] = []

    def make_one(*ranks: Rank) -> CopyEngine:
        made.append(ENGINES[request.param](*ranks))
        return made[-1]

    yield make_one
    for engine in made:
        engine.close()
