"""A sweep removes what dead writers have left under temporary names, and nothing else at all."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from tests.store.tiers.tier_contract import dump, make_key, make_namespace, make_page
from ucm.store.processes import UNKNOWN, Process, is_running, this_process
from ucm.store.tiers.posix import paths, sweep, writers
from ucm.store.tiers.posix.sweep import Sweep, Swept
from ucm.store.tiers.posix.tier import PosixTier

HOUR_S = 3600.0
SMALL = make_namespace("model", page_bytes=4096)
HERE = this_process()
ELSEWHERE = Process("node2", "f" * 16, 1, 1)
SETTLE_S = 0.01


def temp_name(target: str, writer: Process) -> str:
    word = writers.writer_name(writer, now_s=1_700_000_000, random=random.randbytes(8).hex())
    directory, name = os.path.split(target)
    return f"{directory}/.{name}.{word}.tmp"


def dead_writer() -> Process:
    """One that has run here, and ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        began = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
        writer = Process(HERE.host, HERE.world, process.pid, began)
        assert is_running(writer.pid, writer.began) is True
        process.communicate(b"\n")
    return writer


class Told(Event):
    """Is told of what a sweep waits for, in place of waiting."""

    def __init__(self, waits: Callable[[float], object]) -> None:
        super().__init__()
        self._waits = waits

    def wait(self, timeout: float | None = None) -> bool:
        self._waits(timeout or 0.0)
        return False


class Store:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tier = PosixTier([str(directory)])
        dump(self.tier, SMALL, make_key(1), make_page(SMALL, "a"))
        self.good = self.files()

    def files(self) -> set[str]:
        """Links and all."""
        return {
            os.path.join(directory, name)
            for directory, _, names in os.walk(self.directory)
            for name in names
        }

    def targets(self) -> list[str]:
        """Of every kind of file that is written and then renamed."""
        return [
            paths.backend_id_path(str(self.directory)),
            paths.manifest_path(str(self.directory), SMALL.fingerprint),
            paths.block_path(str(self.directory), SMALL.fingerprint, make_key(1)),
            paths.block_path(str(self.directory), SMALL.fingerprint, make_key(2)),
        ]

    def leave(self, writer: Process, *, age_s: float = 0.0) -> set[str]:
        """One file for each target."""
        left = set()
        for target in self.targets():
            name = temp_name(target, writer)
            os.makedirs(os.path.dirname(name), exist_ok=True)
            Path(name).write_bytes(b"x" * 100)
            now_s = os.stat(name).st_mtime
            os.utime(name, (now_s - age_s, now_s - age_s))
            left.add(name)
        return left


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def swept(store: Store, **changes: object) -> Swept:
    done = Sweep(**made(store, **changes)).run()  # type: ignore[arg-type]
    assert done is not None
    return done


def made(store: Store, **changes: object) -> dict[str, object]:
    wanted: dict[str, object] = {
        "path": str(store.directory),
        "stale_s": HOUR_S,
        "dirs_per_s": 1e6,
        "stop": Event(),
        "settle_s": SETTLE_S,
    }
    return wanted | changes


@pytest.fixture
def changed_long_ago(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """The clock of the filesystem goes on by so much: nobody can set a file's time of change."""

    def pass_by(seconds: float) -> None:
        now_s = sweep._ask_clock
        monkeypatch.setattr(sweep, "_ask_clock", lambda root: now_s(root) + seconds)

    return pass_by


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
    assert swept(store).num_emptied == 0, "its own directory has changed with that"
    changed_long_ago(50 * HOUR_S)
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

    def sweep_on() -> None:
        while not stop.is_set():
            done = swept(store, empty_s=1e-9, stop=Told(lambda seconds: None))
            assert done.num_problems == 0, done.problem
            removed.append(done.num_emptied)

    removed: list[int] = []
    thread = threading.Thread(target=sweep_on)
    thread.start()
    try:
        for number in range(2, 400):
            key = make_key(number % 4 + 2)
            dump(store.tier, SMALL, key, make_page(SMALL, "a"))
            page = Path(paths.block_path(str(store.directory), SMALL.fingerprint, key))
            assert page.exists()
            page.unlink()
    finally:
        stop.set()
        thread.join()
    assert sum(removed) > 10


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
