"""How a node cache comes to be, is found, and goes."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.store.node.support import (
    PAGE_BYTES,
    Engine,
    Place,
    alive,
    child,
    content,
    engine,
    kill,
    log_of,
    make_keys,
    wait_until,
)
from ucm.errors import ConfigError
from ucm.store.client.start import connect_or_start

pytestmark = pytest.mark.process
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
STRANGER = 65534
_CAP_SYS_NICE = 23


def test_of_many_clients_that_come_at_once_one_starts_it(place: Place) -> None:
    settings = place.settings()

    with ThreadPoolExecutor() as threads, ExitStack() as stack:
        starting = [threads.submit(Engine, settings, f"engine{i}/0") for i in range(6)]
        clients = [stack.enter_context(each.result()) for each in starting]

        assert len({client.pid for client in clients}) == 1
        assert place.pids() == [clients[0].pid]
        assert len(clients[0].status().sessions) == len(clients)
    assert log_of(settings).count(" serves at ") == 1


def test_everybody_with_the_same_settings_finds_the_same_one(place: Place) -> None:
    settings, keys = place.settings(), make_keys("a", 4)
    with engine(settings, "one/0") as one, engine(settings, "two/0") as two:
        assert one.client.welcome == two.client.welcome
        one.dump(keys)
        one.wait_written()

        assert two.load(keys) == (4, 0)


def test_socket_and_directory_are_private(place: Place) -> None:
    settings = place.settings()
    with Engine(settings):
        socket_path = Path(settings.socket_path)

        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
        assert stat.S_IMODE(socket_path.parent.stat().st_mode) == 0o700


@as_root
def test_a_directory_of_somebody_else_is_refused_with_what_to_do(place: Place) -> None:
    settings = place.settings()
    directory = Path(settings.socket_path).parent
    directory.mkdir()
    os.chown(directory, STRANGER, STRANGER)

    with pytest.raises(ConfigError) as raised:
        connect_or_start(settings, session="x/0", role="tool", timeout_s=1.0)

    message = str(raised.value)
    assert message.startswith(f"node_cache_socket: {directory} belongs to uid {STRANGER}")
    assert "set a path in a directory of your own" in message
    assert "\n" not in message
    assert place.pids() == []
    assert list(directory.iterdir()) == []


def test_a_directory_that_others_may_write_to_is_refused_with_what_to_do(place: Place) -> None:
    settings = place.settings()
    directory = Path(settings.socket_path).parent
    directory.mkdir()
    directory.chmod(0o777)

    with pytest.raises(ConfigError, match=r"others may write to .*chmod 700 it"):
        connect_or_start(settings, session="x/0", role="tool", timeout_s=1.0)


@as_root
def test_a_process_of_another_user_gets_neither_answers_nor_the_memory(place: Place) -> None:
    settings = place.settings()
    with engine(settings) as client:
        # As if somebody had opened the doors.
        place.directory.chmod(0o711)
        Path(settings.socket_path).parent.chmod(0o711)
        Path(settings.socket_path).chmod(0o666)
        with child("intrude", settings) as stranger:
            output, _ = stranger.communicate("go on\n", timeout=30.0)

        assert output == "0 0\n"
        assert f"refused a connection: from uid {STRANGER}" in log_of(settings)
        assert len(client.status().sessions) == 1


@as_root
@pytest.mark.parametrize("directory_mode", [0o700, 0o711])
def test_another_user_is_told_at_once_whose_it_is(place: Place, directory_mode: int) -> None:
    """Whether or not the directory lets them see the socket."""
    settings = place.settings()
    with engine(settings) as client:
        place.directory.chmod(0o711)
        Path(settings.socket_path).parent.chmod(directory_mode)
        with child("knock", settings) as stranger:
            output, _ = stranger.communicate("go on\n", timeout=30.0)
        said = f"{settings.socket_path} is uid 0's, and this process is uid {STRANGER}: a node"
        assert [said in line for line in output.splitlines()] == [True, True], output
        assert len(client.status().sessions) == 1


@pytest.mark.alone
def test_it_leaves_when_nobody_has_needed_it_for_a_while(place: Place) -> None:
    settings, keys = place.settings(idle_exit_s=0.3), make_keys("a", 4)
    with engine(settings) as client:
        client.dump(keys)
        first = client.pid
        time.sleep(0.8)
        assert client.status().pid == first
    wait_until(lambda: not alive(first), "it has left")
    assert not Path(settings.socket_path).exists()

    with engine(settings) as client:
        assert client.pid != first
        assert client.load(keys) == (4, 4)


def test_who_connects_and_says_nothing_does_not_keep_it_from_leaving(place: Place) -> None:
    settings = place.settings(idle_exit_s=0.3)
    with Engine(settings) as client:
        pid = client.pid
        silent = [socket_to(settings.socket_path) for _ in range(3)]
    try:
        wait_until(lambda: not alive(pid), "it has left")
    finally:
        for sock in silent:
            sock.close()


def socket_to(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(path)
    return sock


def test_sigterm_lets_it_write_out_what_is_queued(place: Place) -> None:
    """Small pages, and very many, so that most of them still wait when it is told to leave."""
    settings = place.settings(write_threads=1, write_queue_pages=10_000)
    keys = make_keys("queued", 1500)
    with Engine(settings) as client:
        client.open_namespace(page_bytes=4096)
        assert min(client.reserve(keys)) >= 0
        client.commit(keys)
        assert client.status().queues["write_pages"] > 1000
        os.kill(client.pid, signal.SIGTERM)
        wait_until(lambda: not alive(client.pid), "it has left")

    assert place.blocks() == {place.block(key) for key in keys}
    assert place.stray_files() == []
    with Engine(settings) as client:
        client.open_namespace(page_bytes=4096)
        assert client.look_up(keys).from_files == len(keys)


def test_a_start_while_another_is_leaving_succeeds_when_that_one_has_left(place: Place) -> None:
    """One that leaves holds the lock, and answers nobody, until its pages are written."""
    settings = place.settings()
    Path(settings.socket_path).parent.mkdir(mode=0o700)
    lock = os.open(f"{settings.socket_path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    leaving = threading.Timer(1.0, os.close, [lock])
    leaving.start()

    with Engine(settings) as client:
        assert client.status().invariant == ""

    leaving.join()


def test_the_socket_of_one_that_was_killed_is_taken_over(place: Place) -> None:
    settings = place.settings()
    with Engine(settings) as client:
        kill(client.pid)
        assert Path(settings.socket_path).exists()

    with Engine(settings) as successor:
        assert successor.pid != client.pid


def holders(inode: int) -> set[int]:
    """Processes that have the memory with this inode open or mapped."""
    return {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if holds(pid, inode)}


def holds(pid: int, inode: int) -> bool:
    try:
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        fds = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False  # it has ended
    mapped = {line.split()[4] for line in maps if "memfd:ucm-node-cache" in line}
    return str(inode) in mapped or any(is_memory(fd, inode) for fd in fds)


def is_memory(fd: Path, inode: int) -> bool:
    try:
        return "memfd:ucm-node-cache" in os.readlink(fd) and os.stat(fd).st_ino == inode
    except OSError:
        return False  # closed


def test_memory_lives_as_long_as_a_process_that_maps_it_and_no_longer(place: Place) -> None:
    """It has no name: what no process holds, the kernel has freed."""
    settings, (key,) = place.settings(), make_keys("a", 1)
    with engine(settings) as client:
        inode = os.fstat(client.client.memory_fd).st_ino
        (offset,) = client.dump([key])
        assert holders(inode) == {client.pid, os.getpid()}

        kill(client.pid)

        assert holders(inode) == {os.getpid()}
        assert client.memory[offset : offset + PAGE_BYTES] == content(key)
    assert holders(inode) == set()
    assert not [name for name in os.listdir("/dev/shm") if "ucm" in name]


def test_neither_its_starters_group_nor_a_terminal_that_closes_takes_it_away(place: Place) -> None:
    with engine(place.settings(), "one/0") as one:
        assert os.getpgid(one.pid) == one.pid
        # Yet it shares cores with the engines as one of them, where sessions share them first.
        assert os.getsid(one.pid) == os.getsid(0)
        os.kill(one.pid, signal.SIGHUP)
        assert one.status().pid == one.pid
        one.dump(make_keys("a", 1))


def _may_be_nice() -> bool:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (each for each in lines if each.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) & 1 << _CAP_SYS_NICE)


@pytest.mark.skipif(not _may_be_nice(), reason="needs CAP_SYS_NICE")
def test_who_answers_the_engines_comes_before_them_and_who_works_for_it_does_not(
    place: Place,
) -> None:
    with engine(place.settings(), "one/0") as one:
        pid = one.pid
        threads = {int(each) for each in os.listdir(f"/proc/{pid}/task")} - {pid}
        assert os.getpriority(os.PRIO_PROCESS, pid) < 0
        assert threads
        assert all(os.getpriority(os.PRIO_PROCESS, thread) >= 0 for thread in threads)
