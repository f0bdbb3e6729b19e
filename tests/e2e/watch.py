"""What processes do, read from /proc."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from typing_extensions import Self

# A mapping stays for longer than a file that is read and closed, and takes longer to look for.
_MAPS_EVERY = 50


class OpenFiles:
    """While it is entered, looks again and again which files under `folder` these processes have
    open or mapped. `seen` maps pids to their files."""

    def __init__(self, folder: Path, pids: Iterable[int]) -> None:
        self.seen: defaultdict[int, set[str]] = defaultdict(set)
        self.num_looks = 0
        self._folder = f"{folder}/"
        self._pids = sorted(pids)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="open-files")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.is_set():
            self.num_looks += 1
            for pid in self._pids:
                names = _opened(pid)
                if self.num_looks % _MAPS_EVERY == 1:
                    names |= _mapped(pid)
                files = {name for name in names if name.startswith(self._folder)}
                if files:
                    self.seen[pid] |= files


def holders(memories: set[tuple[int, int]]) -> dict[int, str]:
    """Processes that have one of these files (device, inode) open or mapped."""
    found = {}
    for process in psutil.process_iter():
        pid = process.pid
        if _opened_inodes(pid) & memories or _mapped_inodes(pid) & memories:
            found[pid] = _command_line(pid)
    return found


def cpu_s(processes: Iterable[psutil.Process], *, over_s: float) -> float:
    """How much CPU time these processes use in the next `over_s` seconds."""
    listed = list(processes)
    before_s = sum(sum(process.cpu_times()[:2]) for process in listed)
    time.sleep(over_s)
    return sum(sum(process.cpu_times()[:2]) for process in listed) - before_s


def _opened(pid: int) -> set[str]:
    names = set()
    folder = f"/proc/{pid}/fd"
    for fd in _listed(folder):
        with suppress(OSError):  # closed meanwhile
            names.add(os.readlink(f"{folder}/{fd}"))
    return names


def _mapped(pid: int) -> set[str]:
    return {
        line.split(maxsplit=5)[5] for line in _maps(pid) if line.count(" ") >= 5 and "/" in line
    }


def _opened_inodes(pid: int) -> set[tuple[int, int]]:
    found = set()
    folder = f"/proc/{pid}/fd"
    for fd in _listed(folder):
        with suppress(OSError):
            file = os.stat(f"{folder}/{fd}")
            found.add((file.st_dev, file.st_ino))
    return found


def _mapped_inodes(pid: int) -> set[tuple[int, int]]:
    found = set()
    for line in _maps(pid):
        _, _, _, device, inode, *_ = line.split()
        major, minor = (int(part, 16) for part in device.split(":"))
        found.add((os.makedev(major, minor), int(inode)))
    return found


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []  # it has ended, or is somebody else's


def _maps(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []


def _command_line(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""
