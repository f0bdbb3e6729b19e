"""What comes into a directory on NFS gives it another time of change a moment later."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.store.tiers.tier_contract import ODD, dump, make_key, make_page
from ucm.store.tiers.posix import filesystem, paths
from ucm.store.tiers.posix.filesystem import Mount
from ucm.store.tiers.posix.retouch import Retouch
from ucm.store.tiers.posix.tier import PosixTier

WAIT_S = 10.0


def wait_for(holds: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + WAIT_S
    while not holds() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return holds()


@pytest.fixture
def seen_through(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def use(kind: str) -> None:
        monkeypatch.setattr(filesystem, "mount_of", lambda path: Mount("/", kind, 0))

    return use


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Directories whose times somebody has set."""
    names: list[str] = []
    monkeypatch.setattr(os, "utime", names.append)
    return names


@pytest.mark.parametrize("kind", ["nfs", "nfs4"])
def test_a_page_touches_its_directory_and_what_new_directories_are_in(
    tmp_path: Path, seen_through: Callable[[str], None], touched: list[str], kind: str
) -> None:
    seen_through(kind)
    store, key = str(tmp_path), make_key(1)
    tier = PosixTier([store])
    tier.open_namespace(ODD)
    dump(tier, ODD, key, make_page(ODD, "a"))
    page = Path(paths.block_path(store, ODD.fingerprint, key))
    expected = {str(each) for each in (page.parents[0], page.parents[1], page.parents[2], tmp_path)}
    assert wait_for(lambda: set(touched) == expected), touched

    touched.clear()
    os.unlink(page)
    dump(tier, ODD, key, make_page(ODD, "a"))
    assert wait_for(lambda: touched == [str(page.parent)]), touched


def test_a_page_touches_nothing_where_clients_do_not_believe_in_times(
    tmp_path: Path, seen_through: Callable[[str], None], touched: list[str]
) -> None:
    for i, kind in enumerate(("ext4", "fuse.glusterfs", "ceph")):
        seen_through(kind)
        tier = PosixTier([str(tmp_path / str(i))])
        tier.open_namespace(ODD)
        dump(tier, ODD, make_key(1), make_page(ODD, "a"))
    assert not _threads()
    assert touched == []


def test_a_directory_that_changes_again_is_touched_after_its_last_change() -> None:
    touched: list[tuple[str, float]] = []
    retouch = Retouch(lambda path: touched.append((path, time.monotonic())), delay_s=0.1)
    retouch.later("changes twice")
    time.sleep(0.05)
    retouch.later("other")
    again_s = time.monotonic()
    retouch.later("changes twice")
    assert wait_for(lambda: len(touched) == 2)
    assert [name for name, _ in touched] == ["other", "changes twice"]
    assert touched[1][1] - again_s >= 0.1


def test_what_cannot_be_touched_keeps_nothing_else_from_it_and_no_thread_stays() -> None:
    touched: list[str] = []

    def touch(path: str) -> None:
        if path == "gone":
            raise FileNotFoundError(path)
        touched.append(path)

    retouch = Retouch(touch, delay_s=0.001)
    for i in range(3):
        retouch.later("gone")
        retouch.later(f"there {i}")
        assert wait_for(lambda: not _threads())
    assert touched == ["there 0", "there 1", "there 2"]


def test_storage_that_hangs_fills_no_memory() -> None:
    hangs, touched = threading.Event(), []

    def touch(path: str) -> None:
        hangs.wait(WAIT_S)
        touched.append(path)

    retouch = Retouch(touch, delay_s=0.0)
    for i in range(40_000):
        retouch.later(str(i))
    hangs.set()
    assert wait_for(lambda: not _threads())
    assert 0 < len(touched) < 40_000


def _threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name == "ucm-retouch"]
