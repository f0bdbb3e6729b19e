"""What reading pages asks of the filesystem."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.store.node.support import FINGERPRINT, PAGE_BYTES, content, make_keys
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import HIT, TierNamespace

NAMESPACE = TierNamespace(FINGERPRINT, PAGE_BYTES, b"{}")
NUM_PAGES = 8
CALLS = ("stat", "lstat", "fstat", "open", "preadv", "close")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each system call was made."""
    counted: Counter[str] = Counter()

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted_call(*args: Any, **more: Any) -> Any:
            counted[name] += 1
            return call(*args, **more)

        return counted_call

    for name in CALLS:
        monkeypatch.setattr(os, name, counting(name, getattr(os, name)))
    return counted


def test_a_page_is_opened_asked_for_its_size_read_and_closed_and_the_backend_looked_at_once_for_all(
    tmp_path: Path, asked: Counter[str]
) -> None:
    tier = PosixTier([str(tmp_path)])
    tier.open_namespace(NAMESPACE)
    keys = make_keys("few questions", NUM_PAGES)
    pages = [memoryview(bytearray(padded_bytes(PAGE_BYTES))) for _ in keys]
    for key, page in zip(keys, pages, strict=True):
        page[:PAGE_BYTES] = content(key)
        staged = tier.stage(NAMESPACE, key, page, num_tokens=16)
        assert staged is not None
        tier.publish(staged)

    asked.clear()
    assert tier.read_all(NAMESPACE, keys, pages) == [HIT] * NUM_PAGES

    each = dict.fromkeys(("open", "fstat", "preadv", "close"), NUM_PAGES)
    assert asked == {**each, "lstat": 1}
