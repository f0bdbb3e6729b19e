from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.store.tiers.posix.sweep_parts import Store
from ucm.store.tiers.posix import sweep


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def changed_long_ago(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """The clock of the filesystem goes on by so much: nobody can set a file's time of change."""

    def pass_by(seconds: float) -> None:
        now_s = sweep._ask_clock
        monkeypatch.setattr(sweep, "_ask_clock", lambda root: now_s(root) + seconds)

    return pass_by
