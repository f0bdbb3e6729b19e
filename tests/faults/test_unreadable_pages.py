"""A page's file that this user may not read is absent, and said; one of its own is replaced."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parts.strangers import STRANGER, run_as_stranger
from tests.store.tiers.tier_contract import (
    BLOCK_TOKENS,
    SMALL,
    content_of,
    dump,
    load,
    make_key,
    make_page,
)
from ucm.errors import TierError
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.tier import PosixTier

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
KEYS = [make_key(i) for i in range(4)]
PAGE = make_page(SMALL, "a")


@pytest.fixture
def store() -> Iterator[Path]:
    """With pages of a user that is not root; others can get to it."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = Path(directory) / "store"
        tier = PosixTier([str(path)])
        for key in KEYS:
            assert dump(tier, SMALL, key, PAGE)
        for each in [path, *path.rglob("*")]:
            os.chown(each, STRANGER, STRANGER)
        yield path


def block(store: Path, i: int) -> Path:
    return Path(paths.block_path(str(store), SMALL.fingerprint, KEYS[i]))


def as_stranger(what: str, store: Path) -> str:
    """Runs a function of this module as that user. Returns what it has logged."""
    imports = "from pathlib import Path; from tests.faults import test_unreadable_pages as here"
    return run_as_stranger(imports, f"here.{what}(Path(sys.argv[1]))", store)


def replace_own(store: Path) -> None:
    tier = PosixTier([str(store)])
    for _ in range(3):
        assert tier.contains(SMALL, KEYS) == 1
    assert not tier.holds(SMALL, KEYS[1])
    assert dump(tier, SMALL, KEYS[1], PAGE)
    assert load(tier, SMALL, KEYS[1]) == content_of(SMALL, PAGE)
    assert tier.contains(SMALL, KEYS) == len(KEYS)


def leave_others(store: Path) -> None:
    tier = PosixTier([str(store)])
    assert tier.contains(SMALL, KEYS) == 1
    with pytest.raises(TierError, match="can't be looked up: Permission denied"):
        tier.stage(SMALL, KEYS[1], PAGE, num_tokens=BLOCK_TOKENS)


@as_root
def test_a_page_of_ones_own_that_one_may_not_read_is_absent_and_written_anew(store: Path) -> None:
    block(store, 1).chmod(0)
    said = as_stranger("replace_own", store)
    assert said.count(f"{block(store, 1)}: uid {STRANGER} may not read it") == 1


@as_root
def test_a_page_of_somebody_else_that_one_may_not_read_is_absent_and_stays(store: Path) -> None:
    """Whoever wrote it reads it: two users who replace each other's pages find none of them."""
    os.chown(block(store, 1), 0, 0)
    block(store, 1).chmod(0o600)
    before = block(store, 1).stat()
    said = as_stranger("leave_others", store)
    assert said.count("may not read it") == 1
    assert os.path.samestat(before, block(store, 1).stat())


@as_root
def test_a_page_that_may_be_read_by_a_group_is_there(store: Path) -> None:
    os.chown(block(store, 1), 0, STRANGER)
    block(store, 1).chmod(0o640)
    as_stranger("find_all", store)


def find_all(store: Path) -> None:
    assert PosixTier([str(store)]).contains(SMALL, KEYS) == len(KEYS)
