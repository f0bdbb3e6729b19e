"""A directory with a store, for node caches of its own."""

from __future__ import annotations

from tests.store.conftest import place

__all__ = ["place"]
