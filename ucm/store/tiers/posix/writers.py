"""Who made a file, as its name says it, and who may remove what such a writer has left. Pure.

    <host>-<world>-<pid>-<began>-<seconds since 1970>-<random>      world, random: 16 hex digits
    <host>-<pid>-<seconds since 1970>-<random>                      as older versions did

Unique by its random part. The host is for people; what tells a process from all others, wherever it
runs, are its world, its id and when it began (processes.py). Containers with one host name, a
process id that is used again, and a machine that was booted anew are told apart by them.

A file of a live writer is never removed by others that can see that writer. A writer that can't be
seen from here, on another machine or in another container, counts as alive for hours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from ucm.store.processes import UNKNOWN, Process

# Common filesystems take names of 255 bytes; a temporary name needs 145 beside the host.
_MAX_HOST_CHARS: Final = 64
PATTERN: Final = (
    r"(?P<host>[A-Za-z0-9._]+)(-(?P<world>[0-9a-f]{16}))?-(?P<pid>\d{1,19})"
    r"(?(world)-(?P<began>\d{1,19}))-(?P<created_s>\d{1,19})-(?P<random>[0-9a-f]{16})"
)


@dataclass(frozen=True)
class WriterName:
    """`created_s` is when a file was made, by its maker's own clock."""

    process: Process
    created_s: int


def writer_name(process: Process, *, now_s: float, random: str) -> str:
    """`random` is 16 hex digits that were never given out before."""
    # A clock that was never set may stand before 1970, and a name has no sign.
    created_s = max(0, int(now_s))
    return (
        f"{_plain(process.host)}-{process.world}-{process.pid}-{process.began}-{created_s}-{random}"
    )


def parsed(match: re.Match[str]) -> WriterName:
    """Of a name that matched `PATTERN`."""
    process = Process(
        match["host"], match["world"] or UNKNOWN, int(match["pid"]), int(match["began"] or 0)
    )
    return WriterName(process, int(match["created_s"]))


class Fate(Enum):
    ALIVE = "alive"
    DEAD = "dead"
    UNSEEN = "unseen"


def fate(writer: Process, *, here: Process, is_running: Callable[[int, int], bool | None]) -> Fate:
    """What a process in `here`'s place can say of a writer: what the dead have left may be
    removed, and what those have left that can't be seen if it is stale. `is_running` is asked of
    processes of `here`'s own world only, and says None where it can't tell."""
    runs = is_running(writer.pid, writer.began) if is_seen(writer, here=here) else None
    if runs is None:
        return Fate.UNSEEN
    return Fate.ALIVE if runs else Fate.DEAD


def is_stale(age_s: float | None, *, stale_s: float) -> bool:
    """`age_s` is that since a file was last changed, by the filesystem's own clock; None if that
    can't be told. `stale_s` of 0: never."""
    return age_s is not None and 0 < stale_s <= age_s


def is_seen(writer: Process, *, here: Process) -> bool:
    """Whether `here` can tell if `writer` runs. The host counts as well: copies of a virtual
    machine that was saved while it ran have everything else in common."""
    return writer.world == here.world != UNKNOWN and _plain(writer.host) == _plain(here.host)


def _plain(host: str) -> str:
    # No dots: what stands before a writer in a file's name has some.
    return re.sub(r"[^A-Za-z0-9_]", "_", host)[:_MAX_HOST_CHARS] or "_"
