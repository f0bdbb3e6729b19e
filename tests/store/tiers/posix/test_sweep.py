"""A sweep removes what dead writers have left under temporary names, and nothing else at all."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from tests.store.tiers.posix.sweep_parts import (
    ELSEWHERE,
    HERE,
    HOUR_S,
    SETTLE_S,
    SMALL,
    Store,
    Told,
    dead_writer,
    made,
    swept,
    temp_name,
)
from tests.store.tiers.tier_contract import dump, make_key, make_page
from ucm.store.processes import UNKNOWN, Process
from ucm.store.tiers.posix.sweep import Sweep, Swept


def test_what_the_dead_of_this_machine_have_left_goes_at_once(store: Store) -> None:
    left = store.leave(dead_writer())

    done = swept(store, stale_s=0.0)

    assert store.files() == store.good
    assert (done.num_files, done.num_bytes) == (len(left), 100 * len(left))
    assert (done.problem, done.is_whole) == ("", True)


def test_what_the_living_write_stays_however_old_it_is(
    store: Store, changed_long_ago: Callable[[float], None]
) -> None:
    """Also this process, and one that hangs in a write for days."""
    mine = store.leave(HERE, age_s=1000 * HOUR_S)
    staged = store.tier.stage(SMALL, make_key(3), make_page(SMALL, "a"), num_tokens=128)
    assert staged is not None
    changed_long_ago(1000 * HOUR_S)

    assert swept(store).num_files == 0

    assert store.files() == store.good | mine | {staged.ticket}
    store.tier.publish(staged)
    assert store.tier.contains(SMALL, [make_key(3)]) == 1


@pytest.mark.parametrize(
    "writer",
    [
        ELSEWHERE,
        Process(HERE.host, "f" * 16, HERE.pid, HERE.began),
        Process("node2", HERE.world, HERE.pid, HERE.began),
        Process(HERE.host, UNKNOWN, 1, 0),
    ],
    ids=["another machine", "a container of the same host name", "a copy", "an older version"],
)
def test_what_others_have_left_goes_after_hours(
    store: Store, changed_long_ago: Callable[[float], None], writer: Process
) -> None:
    left = store.leave(writer)
    changed_long_ago(HOUR_S - 60)
    assert swept(store).num_files == 0

    changed_long_ago(61)
    assert swept(store, stale_s=0.0).num_files == 0, "0 hours are never"
    assert store.files() == store.good | left
    assert swept(store).num_files == len(left)
    assert store.files() == store.good


def test_a_name_of_the_first_version_is_taken_for_somebody_elses(
    store: Store, changed_long_ago: Callable[[float], None]
) -> None:
    target = Path(store.targets()[2])
    old = target.with_name(f".{target.name}.node1.example.com-1-1700000000-0123456789abcdef.tmp")
    old.write_bytes(b"x")
    assert swept(store).num_files == 0
    changed_long_ago(HOUR_S)
    assert swept(store).num_files == 1
    assert store.files() == store.good


def test_a_clock_of_this_machine_that_is_wrong_makes_nothing_old(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = store.leave(ELSEWHERE)
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert swept(store).num_files == 0
    assert store.files() == store.good | left, "nor is anything left of asking for the time"


def test_a_file_that_looks_old_and_is_still_written_stays(
    store: Store, changed_long_ago: Callable[[float], None]
) -> None:
    """Its writer's clock is wrong, and the filesystem believes it."""
    left = store.leave(ELSEWHERE)
    written = min(left)
    changed_long_ago(HOUR_S)

    def write(seconds: float) -> None:
        if seconds == SETTLE_S:
            with open(written, "ab") as file:
                file.write(b"x")

    swept(store, stop=Told(write))
    assert store.files() == store.good | {written}


def test_nothing_but_names_of_our_own_is_touched(
    store: Store, tmp_path: Path, changed_long_ago: Callable[[float], None]
) -> None:
    """Whatever lies in the store, and wherever its links lead."""
    dead = dead_writer()
    outside = tmp_path / "outside"
    outside.mkdir()
    target = store.targets()[2]
    leaf = Path(target).parent
    name = Path(temp_name(target, dead)).name
    kept = {outside / name, leaf / ".nfs000000000000a1b200000003", leaf / f"{name}~"}
    kept |= {leaf / f".{Path(target).name}.tmp", leaf / name[1:], leaf / "notes.tmp"}
    kept |= {store.directory / "quarantine" / "x" / name, store.directory / "other" / name}
    kept |= {store.directory / SMALL.fingerprint.hex() / "AB" / name}
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    # Our own names, and no files.
    (leaf / Path(temp_name(target, dead)).name).symlink_to(outside / name)
    os.mkfifo(temp_name(target, dead))
    os.mkdir(temp_name(target, dead))
    # Directories of ours that are links.
    (store.directory / ("0" * 64)).symlink_to(outside)
    (store.directory / SMALL.fingerprint.hex() / "ff").symlink_to(outside)
    (leaf.parent / "ff").symlink_to(outside)
    before = store.files() | {str(path) for path in kept}
    changed_long_ago(HOUR_S)

    assert swept(store).num_files == 0

    assert {path for path in before if os.path.lexists(path)} == before


def test_a_directory_that_becomes_a_link_meanwhile_is_not_followed(
    store: Store, tmp_path: Path, changed_long_ago: Callable[[float], None]
) -> None:
    left = store.leave(ELSEWHERE)
    outside = tmp_path / "outside"
    leaf = Path(store.targets()[2]).parent
    changed_long_ago(HOUR_S)

    def swap(seconds: float) -> None:
        if seconds == SETTLE_S:
            leaf.rename(outside)
            leaf.symlink_to(outside)

    done = swept(store, stop=Told(swap))
    assert done.problem == ""
    assert any(path.name.endswith(".tmp") for path in outside.iterdir())
    assert done.num_files == len(left) - 1


def test_no_backend_is_told_from_one_without_anything_left(tmp_path: Path, store: Store) -> None:
    wanted = made(store)
    assert Sweep(**{**wanted, "path": str(tmp_path / "none")}).run() is None  # type: ignore[arg-type]
    (tmp_path / "mount_point").mkdir()
    path = str(tmp_path / "mount_point")
    assert Sweep(**{**wanted, "path": path}).run() is None  # type: ignore[arg-type]
    assert list((tmp_path / "mount_point").iterdir()) == []
    assert swept(store).num_files == 0


def test_what_can_not_be_removed_is_told_once_and_the_rest_goes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = store.leave(dead_writer())
    unlink = os.unlink
    stuck = {Path(path).name for path in sorted(left)[:2]}

    def refuse(name: str, *, dir_fd: int) -> None:
        if name in stuck:
            raise PermissionError(1, "Operation not permitted")
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", refuse)
    done = swept(store)
    assert (done.num_files, done.num_problems) == (len(left) - 2, 2)
    assert done.problem.endswith(": Operation not permitted")


def test_a_sweep_that_is_told_to_stop_ends_between_two_directories(store: Store) -> None:
    for number in range(50):
        dump(store.tier, SMALL, make_key(number), make_page(SMALL, "a"))
    stop = Event()
    done: list[Swept | None] = []
    slow = Sweep(**made(store, stop=stop, dirs_per_s=1.0))  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: done.append(slow.run()))
    thread.start()
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert done[0] is not None
    assert not done[0].is_whole
    assert done[0].num_directories < 50


def test_a_sweep_lists_no_more_directories_than_it_may(store: Store) -> None:
    """What it waits for is counted, not how long that took."""
    for number in range(20):
        dump(store.tier, SMALL, make_key(number), make_page(SMALL, "a"))
    waits_s: list[float] = []
    done = swept(store, stop=Told(waits_s.append), dirs_per_s=1.0)
    assert len(waits_s) == done.num_directories
    # Work and rest make up a second, or the rest is four times the work.
    assert min(waits_s) >= 0.8


def test_descriptors_are_given_back(store: Store) -> None:
    before = os.listdir("/proc/self/fd")
    store.leave(dead_writer())
    swept(store)
    assert os.listdir("/proc/self/fd") == before


def test_what_has_been_in_quarantine_for_long_goes_and_what_is_new_there_stays(
    store: Store, changed_long_ago: Callable[[float], None]
) -> None:
    """A link goes itself, a directory stays, and nobody's own files are looked at."""
    folder = store.directory / "quarantine" / SMALL.fingerprint.hex()
    folder.mkdir(parents=True)
    (folder / "damaged").write_bytes(b"x")
    (folder / "link").symlink_to(store.directory)
    (folder / "directory").mkdir()
    (folder.parent / "notes").mkdir()
    (folder.parent / "notes" / "mine").write_bytes(b"x")

    assert swept(store, quarantine_s=HOUR_S).num_quarantined == 0
    changed_long_ago(2 * HOUR_S)
    assert swept(store, quarantine_s=0).num_quarantined == 0
    assert swept(store, quarantine_s=HOUR_S).num_quarantined == 2

    assert [path.name for path in folder.iterdir()] == ["directory"]
    assert (folder.parent / "notes" / "mine").exists()
    assert store.good <= store.files()


def test_what_an_nfs_client_keeps_in_quarantine_does_not_keep_the_rest_there(
    store: Store, changed_long_ago: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as it is open somewhere, it can't be removed."""
    folder = store.directory / "quarantine" / SMALL.fingerprint.hex()
    folder.mkdir(parents=True)
    names = [".nfs00000000000000e100000003", *(f"damaged{i}" for i in range(9))]
    for name in names:
        (folder / name).write_bytes(b"x")
    changed_long_ago(2 * HOUR_S)
    unlink = os.unlink

    def is_busy(name: str, **where: int) -> None:
        if name == names[0]:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), name)
        unlink(name, **where)

    monkeypatch.setattr(os, "unlink", is_busy)
    done = swept(store, quarantine_s=HOUR_S)
    assert (done.num_quarantined, done.num_problems) == (9, 0), done.problem
    assert os.listdir(folder) == names[:1]
