"""A store of two models, one of them with prompts of two salts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.parts import Store, keys_of, manifest
from tests.store.conftest import place as place

PROMPT = list(range(100))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def filled(store: Store) -> Store:
    """6 pages of model a for each of two salts, and 6 of model b."""
    a, b = manifest("a"), manifest("b", kv_dtype="fp8")
    for salt in ("one", "two"):
        store.put(a, keys_of(a, PROMPT, salt=salt))
    store.put(b, keys_of(b, PROMPT))
    return store
