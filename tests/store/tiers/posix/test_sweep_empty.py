"""A sweep removes directories of pages that have been empty for a day, and no writer feels it."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from tests.store.tiers.posix.sweep_parts import HOUR_S, SMALL, Store, Told, swept
from tests.store.tiers.tier_contract import dump, make_key, make_page
from ucm.store.tiers.posix import paths


def directories(store: Store) -> set[str]:
    return {os.path.relpath(path, store.directory) for path, _, _ in os.walk(store.directory)}


def test_directories_that_have_been_empty_for_a_day_go_and_nothing_else(
    store: Store, changed_long_ago: Callable[[float], None]
) -> None:
    """Those above are empty once the sweep has been there, and go with the next one's."""
    namespace, full = SMALL.fingerprint.hex(), Path(store.targets()[2]).parent
    empty = [f"{namespace}/{full.parent.name}/zz", f"{namespace}/notes", "mine", "quarantine/mine"]
    other = "0" * 64
    for name in [*empty, other]:
        (store.directory / name).mkdir(parents=True)
    before = directories(store)
    alone = f"{namespace}/{'00' if full.parent.name != '00' else '01'}"
    beside = f"{namespace}/{full.parent.name}/{'00' if full.name != '00' else '01'}"
    for name in (f"{alone}/ff", beside):
        (store.directory / name).mkdir(parents=True)

    assert swept(store).num_emptied == 0
    changed_long_ago(25 * HOUR_S)
    assert swept(store).num_emptied == 2
    assert directories(store) == before | {alone}
    assert swept(store).num_emptied == 1
    assert directories(store) == before
    assert store.good == store.files()


def test_a_directory_stays_that_somebody_makes_a_file_in_this_moment(
    store: Store, changed_long_ago: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaf = Path(store.targets()[3]).parent
    leaf.mkdir(parents=True, exist_ok=True)
    changed_long_ago(25 * HOUR_S)
    rmdir = os.rmdir

    def write_and_remove(name: str, *, dir_fd: int) -> None:
        dump(store.tier, SMALL, make_key(2), make_page(SMALL, "a"))
        rmdir(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "rmdir", write_and_remove)
    done = swept(store)
    assert (done.num_emptied, done.num_problems) == (0, 0)
    assert Path(store.targets()[3]).exists()


def test_what_an_nfs_client_keeps_of_a_removed_page_that_is_read_is_nobodys_problem(
    store: Store, changed_long_ago: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name of the client's own, and a directory that is busy though nothing is listed in it."""
    leaf, kept = Path(store.targets()[3]).parent, Path(store.targets()[2]).parent
    leaf.mkdir(parents=True, exist_ok=True)
    (kept / ".nfs00000000000000e100000003").write_bytes(b"of a page")
    changed_long_ago(25 * HOUR_S)

    def is_busy(name: str, *, dir_fd: int) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), name)

    monkeypatch.setattr(os, "rmdir", is_busy)
    done = swept(store)
    assert (done.num_emptied, done.num_files, done.num_problems) == (0, 0, 0), done.problem
    assert leaf.is_dir()
    assert (kept / ".nfs00000000000000e100000003").exists()


@pytest.mark.parametrize("said", [errno.ENOENT, errno.ESTALE])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_writer_whose_directory_goes_before_it_makes_its_file_makes_it_again(
    store: Store, monkeypatch: pytest.MonkeyPatch, said: int, depth: int
) -> None:
    """Which it knew, or has just made; NFS may say that it is stale."""
    opened = os.open
    target = Path(store.targets()[3])
    removed: list[str] = []

    def remove_and_open(path: str, flags: int, mode: int = 0o777, **options: int) -> int:
        if flags & os.O_CREAT and str(path).startswith(f"{target.parent}/") and not removed:
            for directory in [target.parent, target.parent.parent][:depth]:
                os.rmdir(directory)
                removed.append(str(directory))
            raise OSError(said, os.strerror(said))
        return opened(path, flags, mode, **options)

    monkeypatch.setattr(os, "open", remove_and_open)
    dump(store.tier, SMALL, make_key(2), make_page(SMALL, "a"))
    assert removed and target.exists()


def test_writers_beside_sweeps_that_remove_every_empty_directory_lose_no_page(
    store: Store,
) -> None:
    """Sweeps that wait for no day, and pages that go as soon as they are written."""
    stop = Event()

    def rest(seconds: float) -> None:
        time.sleep(0.001)

    def sweep_on() -> None:
        while not stop.is_set():
            done = swept(store, empty_s=1e-9, stop=Told(rest))
            assert done.num_problems == 0, done.problem
            removed.append(done.num_emptied)

    removed: list[int] = []
    thread = threading.Thread(target=sweep_on)
    thread.start()
    try:
        number = 0
        while sum(removed) < 20:
            number += 1
            assert number < 100_000, "nothing is ever removed"
            key = make_key(number % 4 + 2)
            dump(store.tier, SMALL, key, make_page(SMALL, "a"))
            page = Path(paths.block_path(str(store.directory), SMALL.fingerprint, key))
            assert page.exists()
            page.unlink()
    finally:
        stop.set()
        thread.join()
