"""Runs one command, and sees to it that nothing of it outlives the process that asked for it.

Standard library only, because it starts before every server: `python -I -S guard.py COMMAND...`.
The caller holds the other end of standard input. The caller's death closes it, however the caller
died; then everything of the same run is killed, whichever guard started it (a node cache leaves the
group of the engine that started it, so groups alone would miss it). One byte there means: kill only
what this guard has started. SIGTERM asks the command to stop, and waits.

The command gets a process group and no session of its own. Linux schedules sessions against each
other, and vLLM's processes wait by giving way to whoever is in theirs: from session to session they
would take whole cores from servers that have work to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time

# The folder for temporary files of one run, in the environment of all its processes: it is where
# they leave things, and the mark by which they are found.
RUN_VARIABLE = "UCM_CLUSTER_RUN"

STOP_TIMEOUT_S = 20.0
_DEATH_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    os.setpgid(0, 0)
    stop_read, stop_write = os.pipe()
    os.set_blocking(stop_write, False)
    signal.signal(signal.SIGTERM, lambda *_: os.write(stop_write, b"t"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    libc = ctypes.CDLL(None)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        # The last resort, when this guard itself is killed. The signal belongs to the thread that
        # forks, and a guard has only one.
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509
    )
    exited = os.pidfd_open(child.pid)
    ready, _, _ = select.select([exited, stop_read, 0], [], [])
    if stop_read in ready:
        child.send_signal(signal.SIGTERM)
        ready, _, _ = select.select([exited, 0], [], [], STOP_TIMEOUT_S)
    if 0 in ready and os.read(0, 1) == b"":
        folder = os.environ[RUN_VARIABLE]
        # Both: a process that has renamed itself (vLLM's do) no longer shows the mark of the run.
        _end(run_processes(folder) | _group_processes())
        shutil.rmtree(folder, ignore_errors=True)
    _end(_group_processes())
    status = child.wait()
    return 128 - status if status < 0 else status


def end_run(folder: str) -> None:
    """Kill every process that carries the mark of the run, guards excepted; remove its folder."""
    _end(run_processes(folder))
    shutil.rmtree(folder, ignore_errors=True)


def run_processes(folder: str) -> set[int]:
    """The living processes that carry the mark of a run, without its guards."""
    mark = f"{RUN_VARIABLE}={folder}".encode()
    return {
        pid
        for pid in _other_processes()
        if mark in _read(pid, "environ").split(b"\0")
        and __file__.encode() not in _read(pid, "cmdline").split(b"\0")
    }


def _group_processes() -> set[int]:
    own_group = os.getpgid(0)
    return {pid for pid in _other_processes() if _group(pid) == own_group}


def _end(pids: set[int]) -> None:
    """Kill them, and remove the shared memory that only they had (killed owners can't)."""
    segments = _shared_memory_of(pids)
    # Python's resource tracker cleans up after killed processes, and then ends by itself.
    trackers = {pid for pid in pids if b"multiprocessing.resource_tracker" in _read(pid, "cmdline")}
    _kill(pids - trackers)
    _wait_dead(pids)
    _kill({pid for pid in trackers if _is_alive(pid)})
    if segments:
        for name in segments - _shared_memory_of(_other_processes()):
            with contextlib.suppress(OSError):
                os.unlink(name)


def _kill(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _wait_dead(pids: set[int]) -> None:
    deadline = time.monotonic() + _DEATH_TIMEOUT_S
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)


def _shared_memory_of(pids: set[int]) -> set[str]:
    """Names under /dev/shm that these processes have mapped."""
    names: set[str] = set()
    for pid in pids:
        for line in _read(pid, "maps").splitlines():
            position = line.find(b" /dev/shm/")
            if position >= 0 and not line.endswith(b" (deleted)"):
                names.add(os.fsdecode(line[position + 1 :]))
    return names


def _other_processes() -> set[int]:
    own = os.getpid()
    pids = {int(name) for name in os.listdir("/proc") if name.isdigit()}
    return {pid for pid in pids if pid != own and _is_alive(pid)}


def _is_alive(pid: int) -> bool:
    fields = _stat_fields(pid)
    return bool(fields) and fields[0] not in (b"Z", b"X")


def _group(pid: int) -> int:
    fields = _stat_fields(pid)
    return int(fields[2]) if fields else -1


def _stat_fields(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the state on: state, parent, group."""
    return _read(pid, "stat").rpartition(b")")[2].split()


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
