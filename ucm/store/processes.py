"""Which process this is, and whether another one still runs, by what the kernel says.

A process id means something in its pid namespace only, is used again, and lasts until a reboot at
the most. So a process is known by three things: the *world* in which its id counts, its id, and
when it began. Where the kernel doesn't tell, the world is `UNKNOWN`, which is nobody's.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

UNKNOWN: Final = "0" * 16
_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"


@dataclass(frozen=True)
class Process:
    """`world` is 16 hex digits: the same for processes that see each other's ids and the same
    clock since boot. `began` counts ticks of that clock."""

    host: str
    world: str
    pid: int
    began: int


_this: Process | None = None


def this_process() -> Process:
    """Looked at once, and again in a child that was forked."""
    global _this
    if _this is None or _this.pid != os.getpid():
        _this = _look()
    return _this


def is_running(pid: int, began: int) -> bool | None:
    """Whether a process of this one's world still can write. None where the kernel doesn't tell."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it is there, and somebody else's
    state, found = state_and_start(pid)
    if not found:
        return None
    if int(found) != began:
        return False
    # Its first thread has ended. Others may hang in a write until storage answers.
    return state not in ("Z", "X") or num_threads(pid) != 1


def pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return "unknown"


def state_and_start(pid: int) -> tuple[str, str]:
    """The state of a process's first thread, and when it began; empty for none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def num_threads(pid: int) -> int:
    """0 for a process that is not there."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def _look() -> Process:
    pid = os.getpid()
    began = state_and_start(pid)[1]
    return Process(os.uname().nodename, _world(pid) if began else UNKNOWN, pid, int(began or 0))


def _world(pid: int) -> str:
    try:
        # A container may have another namespace's /proc, where numbers are others.
        if os.readlink("/proc/self") != str(pid):
            return UNKNOWN
        boot_id = Path(_BOOT_ID).read_text().strip()
        namespaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", *_TIME)]
    except OSError:
        return UNKNOWN
    if not boot_id:
        return UNKNOWN
    return hashlib.sha256("\n".join([boot_id, *namespaces]).encode()).hexdigest()[:16]


# Kernels before 5.6 know one clock for all.
_TIME: Final = ("time",) if os.path.exists("/proc/self/ns/time") else ()
