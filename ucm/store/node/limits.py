"""How much memory a node cache may take: what machine and container have left, less a rest.

One place reads it all: the kernel's word for the machine, and limit and usage of every memory group
(cgroup v1 and v2) from this process's own up to the root, each of which may be the tightest. Cached
file pages count as free, in groups as on the machine. `room_for` decides; nothing else here does.

Promise: `capacity_bytes` <= what is left less the rest, whatever is configured, so that a cache
that fills up makes nobody run out of memory who has what he needs when it starts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ucm.errors import ConfigError

GIB = 1 << 30
_MIB = 1 << 20
_LEAST_BYTES = 1 << 20
_REST_SHARE = 16
_PROC = Path("/proc")
# Taken before all others: a node cache costs hits until the next one is there, an engine its
# requests.
_TAKEN_FIRST = 1000


@dataclass(frozen=True)
class Left:
    """`nbytes` of memory that nobody uses, by the tightest of the limits: `where` says which."""

    nbytes: int
    where: str


@dataclass(frozen=True)
class Room:
    """What a node cache takes. `said` is for its log; `is_cut` when it is less than configured."""

    capacity_bytes: int
    said: str
    is_cut: bool


@dataclass(frozen=True)
class _Version:
    """The files of a memory group: its limits, its usage, and what of it could be given back."""

    limits: tuple[str, ...]
    used: str
    cached: tuple[str, ...]


_V1 = _Version(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_V2 = _Version(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def rest_bytes(left_bytes: int) -> int:
    """What stays for the engines, whose needs grow after the start, and for the node cache's own:
    a sixteenth, at least 1 GiB, at most half."""
    return min(left_bytes // 2, max(GIB, left_bytes // _REST_SHARE))


def room_for(configured_bytes: int, left: Left) -> Room:
    """`configured_bytes` or, for 0, a quarter of what is left. Raises ConfigError where there is
    hardly any."""
    most_bytes = left.nbytes - rest_bytes(left.nbytes)
    if most_bytes < _LEAST_BYTES:
        raise ConfigError(
            f"cache_buffer_capacity_gb: {left.nbytes / _MIB:.1f} MiB of memory are left"
            f" ({left.where}), too little for any node cache: give the container more memory, or"
            f" start fewer processes in it"
        )
    if not configured_bytes:
        why = "a quarter of what is available; set cache_buffer_capacity_gb to choose"
        return Room(max(_LEAST_BYTES, left.nbytes // 4), why, is_cut=False)
    if configured_bytes <= most_bytes:
        return Room(configured_bytes, "cache_buffer_capacity_gb", is_cut=False)
    why = (
        f"not the {configured_bytes / GIB:.2f} of cache_buffer_capacity_gb: {left.nbytes / GIB:.2f}"
        f" GiB are left ({left.where}), and {rest_bytes(left.nbytes) / GIB:.2f} stay for the"
        f" engines; set it to less, or give more memory"
    )
    return Room(most_bytes, why, is_cut=True)


def memory_left(proc: Path = _PROC) -> Left:
    """The memory that is available now, on this machine and in this container."""
    return min((_on_machine(proc), *_left_in_groups(proc)), key=lambda left: left.nbytes)


def be_taken_first(proc: Path = _PROC) -> None:
    """Memory that is shared counts to whoever maps it, so the kernel, when it runs short, may take
    an engine for the node cache's pages. Anybody may raise this number of their own."""
    with suppress(OSError):
        (proc / "self/oom_score_adj").write_text(str(_TAKEN_FIRST))


def _on_machine(proc: Path) -> Left:
    meminfo = proc / "meminfo"
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return Left(int(line.split()[1]) * 1024, f"MemAvailable of {meminfo}")
    raise ConfigError(f"{meminfo} does not say how much memory this {sys.platform} machine has")


def _left_in_groups(proc: Path) -> Iterator[Left]:
    """What each memory limit above this process leaves; the slots count against all of them. A
    limit or a usage that can't be read is none."""
    for group, version in memory_groups(proc):
        used_bytes = _number_in(group / version.used)
        if used_bytes is None:
            continue
        used_bytes -= sum(
            _number_in(group / "memory.stat", line=line) or 0 for line in version.cached
        )
        for limit in version.limits:
            limit_bytes = _number_in(group / limit)
            if limit_bytes is not None:
                yield Left(max(0, limit_bytes - max(0, used_bytes)), str(group / limit))


def _number_in(path: Path, *, line: str = "") -> int | None:
    """The number in a file, or behind a name in a file of many; None if there is none ("max")."""
    try:
        words = path.read_text().split()
        return int(words[words.index(line) + 1] if line else words[0])
    except (OSError, ValueError, IndexError):
        return None


def memory_groups(proc: Path) -> Iterator[tuple[Path, _Version]]:
    """The memory groups of this process, from its own up to the top of what is mounted here."""
    try:
        groups = (proc / "self/cgroup").read_text().splitlines()
        mounts = (proc / "self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = _V1 if controllers else _V2
        for top, at in _mounted(mounts, version):
            group = at / _below(path, top)
            for each in (group, *group.parents):
                yield each, version
                if each == at:
                    break


def _mounted(mounts: list[str], version: _Version) -> Iterator[tuple[str, Path]]:
    """Which group's directory (in the kernel's tree) is mounted where."""
    for line in mounts:
        fields, _, kind = line.partition(" - ")
        top, at = (_unescaped(field) for field in fields.split(" ")[3:5])
        filesystem, _, options = kind.split(" ", 2)
        if version is _V2 and filesystem == "cgroup2":
            yield top, Path(at)
        if version is _V1 and filesystem == "cgroup" and "memory" in options.split(","):
            yield top, Path(at)


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


def _below(path: str, top: str) -> PurePosixPath:
    """A group's path below the one that is mounted. Nothing where it is outside of that, as a path
    of the host's is in a container: what is mounted then is the nearest that can be seen."""
    group = PurePosixPath(path)
    if ".." in group.parts or not group.is_relative_to(top):
        return PurePosixPath()
    return group.relative_to(top)
