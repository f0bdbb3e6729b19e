"""Asking which pages of a prompt are there: how often, and past what this machine remembers."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.store.tiers.tier_contract import SMALL, content_of, dump, load, make_key, make_page
from ucm.store.tiers.posix.backend import Backend
from ucm.store.tiers.posix.filesystem import SeenThrough
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import ReadStatus

KEYS = [make_key(i) for i in range(40)]


@pytest.fixture
def tier(tmp_path: Path) -> PosixTier:
    made = PosixTier([str(tmp_path / "store")])
    made.open_namespace(SMALL)
    return made


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were asked for."""
    asked: list[str] = []
    has_page = Backend.has_page

    def noted(self: Backend, path: str) -> bool:
        asked.append(path)
        return has_page(self, path)

    monkeypatch.setattr(Backend, "has_page", noted)
    return asked


def store(tier: PosixTier, first: int, end: int) -> None:
    for i in range(first, end):
        dump(tier, SMALL, KEYS[i], make_page(SMALL, i))


@pytest.mark.parametrize(("num_stored", "most"), [(40, 2), (0, 1), (30, 8)])
def test_who_reads_what_is_there_asks_for_a_few_of_its_pages(
    tier: PosixTier, looked_at: list[str], num_stored: int, most: int
) -> None:
    store(tier, 0, num_stored)

    assert tier.leads_to(SMALL, KEYS) == num_stored
    assert len(looked_at) <= most


def forget_to_see(monkeypatch: pytest.MonkeyPatch, *unseen: int) -> None:
    """This machine remembers that these were missing, until it asks anew."""
    hidden = {KEYS[i].hex() for i in unseen}
    monkeypatch.setattr(SeenThrough, "remembers_absences", lambda self: True)
    has_page = Backend.has_page

    def remembered(self: Backend, path: str) -> bool:
        if any(name in path for name in hidden):
            raise FileNotFoundError(errno.ENOENT, "missing", path)
        return has_page(self, path)

    monkeypatch.setattr(Backend, "has_page", remembered)


@pytest.mark.parametrize("unseen", [(0,), (39,), (20, 29), (0, 39), (0, 1, 2), (37, 38, 39)])
def test_pages_that_this_machine_takes_for_missing_are_counted(
    tier: PosixTier, monkeypatch: pytest.MonkeyPatch, unseen: tuple[int, ...]
) -> None:
    store(tier, 0, 40)
    forget_to_see(monkeypatch, *unseen)

    assert tier.leads_to(SMALL, KEYS) == 40
    assert tier.contains(SMALL, KEYS) == 40


def test_a_page_that_this_machine_takes_for_missing_is_read(
    tier: PosixTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has asked for it by itself: another one stood for it."""
    store(tier, 0, 1)
    monkeypatch.setattr(SeenThrough, "remembers_absences", lambda self: True)
    files, read = tier._files, tier._files.read
    missing = [True]

    def first_missing(*args: object) -> object:
        if missing:
            missing.clear()
            raise FileNotFoundError(errno.ENOENT, "missing")
        return read(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "read", first_missing)

    assert load(tier, SMALL, KEYS[0]) == content_of(SMALL, make_page(SMALL, 0))
    assert load(tier, SMALL, KEYS[1]) is ReadStatus.ABSENT
