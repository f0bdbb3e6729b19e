"""One node at a time holds the lease of a backend, and no dead one keeps it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ucm.store.processes import Process, this_process
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.lease import ReclaimLease

STALE_S = 60.0
BEAT_S = 7.5
HERE = this_process()


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def lease(clock: Clock, *, host: str = "node1", deletes: bool = True) -> ReclaimLease:
    """Of a process that nobody else can see."""
    here = replace(HERE, host=host, world=host.ljust(16, "f")[:16])
    return ReclaimLease(STALE_S, BEAT_S, deletes, here=here, clock=clock)


def test_the_first_gets_it_and_keeps_it(root: int, clock: Clock) -> None:
    one, two = lease(clock), lease(clock, host="node2")

    for _ in range(100):
        assert one.hold(root)
        assert not two.hold(root)
        clock.now_s += STALE_S / 3
    assert one.still_held(root) and one.is_held and not two.is_held


def test_one_that_falls_silent_is_followed_by_another_and_gives_way(
    root: int, clock: Clock
) -> None:
    one, two = lease(clock), lease(clock, host="node2")
    one.hold(root)
    assert not two.hold(root)
    clock.now_s += STALE_S - 1
    assert not two.hold(root), "silent, but not for long enough"
    clock.now_s += 1
    assert two.hold(root)

    assert not one.still_held(root)
    assert not one.hold(root)
    assert two.hold(root)


def test_who_has_just_come_watches_first_whatever_the_times_of_the_file_say(
    tmp_path: Path, root: int, clock: Clock
) -> None:
    lease(clock).hold(root)
    os.utime(tmp_path / paths.RECLAIM_LEASE, (0, 0))

    assert not lease(clock, host="node2").hold(root)


def test_that_of_a_process_that_can_be_seen_to_be_dead_is_taken_at_once(
    root: int, clock: Clock
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        began = int(Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19])
        other = Process(HERE.host, HERE.world, child.pid, began)
        dead = ReclaimLease(STALE_S, BEAT_S, here=other)
        mine = ReclaimLease(STALE_S, BEAT_S, clock=clock)
        assert dead.hold(root)
        assert not mine.hold(root)
        child.communicate(b"\n")
    assert mine.hold(root)


def test_one_that_may_delete_takes_over_from_one_that_only_counts(root: int, clock: Clock) -> None:
    counts, deletes = lease(clock, deletes=False), lease(clock, host="node2")
    assert counts.hold(root)
    assert not lease(clock, host="node3", deletes=False).hold(root)

    assert deletes.hold(root)
    assert not counts.hold(root)


def test_one_that_is_released_is_free_and_nobody_elses_is(root: int, clock: Clock) -> None:
    one, two = lease(clock), lease(clock, host="node2")
    one.hold(root)
    two.release(root)
    assert one.still_held(root)
    one.release(root)
    assert two.hold(root)


RUBBISH = pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff" * 100, b'{"host": 1}'])


@RUBBISH
def test_one_that_nobody_understands_is_taken_when_no_beat_changes_it(
    tmp_path: Path, root: int, clock: Clock, content: bytes
) -> None:
    (tmp_path / paths.RECLAIM_LEASE).write_bytes(content)
    mine = lease(clock)

    assert not mine.hold(root)
    clock.now_s += BEAT_S
    assert not mine.hold(root)
    clock.now_s += BEAT_S
    assert mine.hold(root)


def test_one_of_a_newer_version_that_beats_is_left_alone(
    tmp_path: Path, root: int, clock: Clock
) -> None:
    mine = lease(clock)
    for beat in range(100):
        (tmp_path / paths.RECLAIM_LEASE).write_text(f'{{"holder": "of a newer version {beat}"}}')
        assert not mine.hold(root)
        clock.now_s += BEAT_S


@RUBBISH
def test_one_that_storage_tears_stays_its_holders(
    tmp_path: Path, root: int, clock: Clock, content: bytes
) -> None:
    """Also after a beat that failed."""
    one, two = lease(clock), lease(clock, host="node2")
    one.hold(root)
    assert not two.hold(root)
    (tmp_path / paths.RECLAIM_LEASE).write_bytes(content)
    one.is_held = False

    assert not two.hold(root)
    assert one.hold(root)
    clock.now_s += BEAT_S
    assert not two.hold(root)


def test_two_that_take_it_in_one_instant_agree_with_the_next_beat(root: int, clock: Clock) -> None:
    """Both write; the later one's word stays."""
    old, one, two = (lease(clock, host=f"node{number}") for number in (1, 2, 3))
    old.hold(root)
    assert not one.hold(root) and not two.hold(root)
    clock.now_s += STALE_S
    assert one.hold(root)
    assert two._renew(root), "it had looked before the other one wrote"

    assert sorted([one.hold(root), two.hold(root)]) == [False, True]
    assert [one.is_held, two.is_held] == [False, True]
