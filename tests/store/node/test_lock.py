"""The lock beside a node cache's socket: one holder at a time, whatever happens to its file."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.store.node.support import ROOT, Place
from ucm.errors import ConfigError, NodeUnavailable
from ucm.store.node.lock import (
    Holder,
    SocketLock,
    lock_path,
    take_lock,
    this_process,
    try_lock,
    why_held_up,
)

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
STRANGER = 65534


@pytest.fixture
def path(place: Place) -> str:
    return place.settings().socket_path


def take(path: str) -> SocketLock:
    lock = try_lock(path)
    assert lock is not None
    return lock


def test_one_holder_at_a_time(path: str) -> None:
    lock = take(path)
    assert try_lock(path) is None
    with pytest.raises(NodeUnavailable, match="another node cache serves"):
        take_lock(path)
    lock.release()
    take(path).release()


def test_the_lock_stays_with_the_process_that_it_is_handed_to(path: str) -> None:
    lock = take(path)
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fd]
    ) as heir:
        lock.handed_over()
        assert try_lock(path) is None
        heir.kill()
    take(path).release()


def test_a_process_that_is_forked_meanwhile_keeps_no_lock(path: str) -> None:
    """An engine forks whenever it likes, and its child lives as long as it likes."""
    lock = take(path)
    read_end, write_end = os.pipe()
    ready, say_ready = os.pipe()
    child = os.fork()
    if not child:
        os.close(write_end)
        os.write(say_ready, b"x")
        os.read(read_end, 1)
        os._exit(0)
    try:
        os.read(ready, 1)
        # As by a kill: nobody says that the lock is free.
        lock.handed_over()
        take(path).release()
    finally:
        for fd in (write_end, read_end, ready, say_ready):
            os.close(fd)
        os.waitpid(child, 0)


def test_who_leaves_removes_its_own_socket_and_not_its_successors(path: str) -> None:
    lock = take(path)
    with lock.listen():
        assert lock.is_listening()
        os.unlink(path)
        os.unlink(lock_path(path))
        successor = take(path)
        with successor.listen():
            assert not lock.is_listening()
            lock.release()
            assert Path(path).exists()
            assert try_lock(path) is None, "the successor's lock is as good as before"
            successor.release()
            assert not Path(path).exists()


def test_a_lock_whose_file_is_gone_is_taken_anew_unless_another_has_it(path: str) -> None:
    lock = take(path)
    assert lock.renew()
    os.unlink(lock_path(path))
    os.rmdir(os.path.dirname(path))
    assert not lock.is_held()
    assert lock.renew()
    assert lock.is_held()
    assert try_lock(path) is None

    os.unlink(lock_path(path))
    other = take(path)
    assert not lock.renew()
    other.release()
    lock.release()


UNDEAD = """
import ctypes, sys, threading, time
from ucm.store.node.lock import take_lock, this_process
lock = take_lock(sys.argv[1])
lock.note(this_process(failures=0, tried_s=0.0))
threading.Thread(target=time.sleep, args=(600,)).start()
print("ready", flush=True)
ctypes.CDLL(None).syscall(60, 0)  # this thread ends, and the process does not
"""


def test_a_holder_of_which_only_hung_threads_are_left_holds_nothing_up(path: str) -> None:
    command = [sys.executable, "-c", UNDEAD, path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as undead:
        try:
            assert undead.stdout is not None
            assert undead.stdout.readline() == "ready\n"
            while Path(f"/proc/{undead.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.01)
            with open(lock_path(path)) as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

            lock = take(path)

            assert lock.is_held()
            assert try_lock(path) is None
            lock.release()
        finally:
            undead.kill()
    assert os.listdir(os.path.dirname(path)) == [f"{os.path.basename(path)}.lock"]


def test_a_lock_that_somebody_else_has_planted_is_not_opened(place: Place, path: str) -> None:
    precious = place.directory / "precious"
    precious.write_text("keep me")
    os.mkdir(os.path.dirname(path), 0o700)

    os.symlink(precious, lock_path(path))
    with pytest.raises(ConfigError, match=r"\.lock: it is a link; remove it"):
        try_lock(path)
    os.unlink(lock_path(path))

    os.link(precious, lock_path(path))
    with pytest.raises(ConfigError, match="is not a plain file of uid"):
        try_lock(path)
    os.unlink(lock_path(path))

    os.mkfifo(lock_path(path))
    with pytest.raises(ConfigError, match="is not a plain file of uid"):
        try_lock(path)
    assert precious.read_text() == "keep me"


@as_root
def test_a_lock_that_belongs_to_somebody_else_is_not_used(path: str) -> None:
    os.mkdir(os.path.dirname(path), 0o700)
    Path(lock_path(path)).touch()
    os.chown(lock_path(path), STRANGER, STRANGER)
    with pytest.raises(ConfigError, match=f"belongs to uid {STRANGER}"):
        try_lock(path)


def test_of_the_lock_of_another_container_only_what_is_true_is_said(path: str) -> None:
    lock = take(path)
    lock.note(Holder(pid=1, pid_namespace="another", pid_started="7"))
    assert why_held_up(path).endswith("does not answer (a pid of another container)")
    lock.release()
    assert why_held_up(path) == ""


def test_a_holder_that_has_gone_holds_nobody_up(path: str) -> None:
    assert why_held_up(path) == ""
    lock = take(path)
    lock.note(replace(this_process(failures=0, tried_s=0.0), pid_started="0"))
    lock.release()
    assert why_held_up(path) == ""
