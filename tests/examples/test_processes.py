"""Servers under their guards: nothing of them is left, however their parent ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from examples.cluster.processes import GuardedProcess, HttpServer, ServerFailed, free_port

pytestmark = pytest.mark.process

PATIENCE_S = 30.0

# A server with what vLLM has: children in its process group, shared memory, and one process that
# leaves for a group of its own, as a node cache does.
FAMILY = """
import os, subprocess, sys, time
from multiprocessing.shared_memory import SharedMemory
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
child = subprocess.Popen(sleep)
daemon = subprocess.Popen(sleep, process_group=0)
memory = SharedMemory(create=True, size=1 << 16)
print(os.getpid(), child.pid, daemon.pid, memory.name, flush=True)
time.sleep(600)
"""

# SIGHUP is ignored where the tests run under nohup.
PARENT = """
import signal, sys, time
from pathlib import Path
from examples.cluster.processes import GuardedProcess, run_folder
signal.signal(signal.SIGHUP, signal.SIG_DFL)
print(run_folder(), flush=True)
with GuardedProcess([sys.executable, "-c", sys.argv[1]], log=Path(sys.argv[2])):
    time.sleep(600)
"""


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def family_of(log: Path) -> tuple[list[int], Path]:
    eventually(lambda: log.exists() and log.read_text().count("\n") == 1)
    *pids, memory = log.read_text().split()
    return [int(pid) for pid in pids], Path("/dev/shm", memory)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_server_and_its_whole_family_die_with_their_parent(tmp_path: Path, number):
    log = tmp_path / "log"
    command = [sys.executable, "-c", PARENT, FAMILY, str(log)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        pids, memory = family_of(log)
        assert parent.stdout is not None
        folder = Path(parent.stdout.readline().strip())
        assert folder.is_dir() and memory.exists()

        try:
            parent.send_signal(number)

            eventually(lambda: not any(is_alive(pid) for pid in pids))
            eventually(lambda: not folder.exists() and not memory.exists())
        finally:
            parent.kill()


def test_a_killed_server_leaves_no_children_and_no_memory_but_its_daemons_live(tmp_path: Path):
    """A node cache is not its first engine's: it serves the others when that engine is killed."""
    with GuardedProcess([sys.executable, "-c", FAMILY], log=tmp_path / "log") as server:
        (own, child, daemon), memory = family_of(tmp_path / "log")

        server.kill()

        assert not is_alive(own) and not is_alive(child) and not memory.exists()
        assert is_alive(daemon)
        os.kill(daemon, signal.SIGKILL)


def test_a_guard_that_is_killed_takes_its_server_along(tmp_path: Path):
    with GuardedProcess([sys.executable, "-c", FAMILY], log=tmp_path / "log") as server:
        (own, *others), memory = family_of(tmp_path / "log")

        psutil.Process(own).parent().kill()

        eventually(lambda: not is_alive(own))
        for pid in others:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not memory.exists())
        assert not server.is_running


def test_a_server_is_asked_to_stop_before_it_is_killed(tmp_path: Path):
    code = "import signal, time; signal.signal(15, lambda *_: exit(7)); print(flush=True)\n"
    log = tmp_path / "log"
    with GuardedProcess([sys.executable, "-c", code + "time.sleep(600)"], log=log) as server:
        eventually(lambda: log.read_text() != "")
        server.stop()

    assert 7 == server.exit_code


def test_a_server_that_ends_at_start_says_why(tmp_path: Path):
    command = [sys.executable, "-c", "raise SystemExit('the disk is on fire')"]
    with (
        HttpServer(command, port=free_port(), log=tmp_path / "log") as server,
        pytest.raises(ServerFailed, match="the disk is on fire"),
    ):
        server.wait_ready(PATIENCE_S)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path):
    command = [sys.executable, "-c", "import time; print('busy', flush=True); time.sleep(600)"]
    with (
        HttpServer(command, port=free_port(), log=tmp_path / "log") as server,
        pytest.raises(ServerFailed, match="not ready after 1 s"),
    ):
        server.wait_ready(1.0)


def test_a_port_that_was_given_out_is_nobody_elses_until_a_server_has_it() -> None:
    port = free_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    with socket.create_server(("127.0.0.1", port)):
        pass


FORK = """
import os, socket
from examples.cluster.serve_vllm import close_what_would_not_be_inherited
port = socket.create_server(("127.0.0.1", 0))
ends = [socket.create_connection(port.getsockname()), port.accept()[0], *socket.socketpair()]
os.register_at_fork(after_in_child=close_what_would_not_be_inherited)
if os.fork() == 0:
    for each in (port, *ends):
        print(os.readlink(f"/proc/self/fd/{each.fileno()}").partition(":")[0], flush=True)
else:
    os.wait()
"""


def test_a_forked_engine_holds_its_servers_connections_and_not_its_port():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=True)

    assert ["/dev/null", *["socket"] * 4] == done.stdout.split()
