"""What a second node sees of what this one does, where its mount of the same storage is at hand."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

import msgspec

from ucm.store.inspect.contents import backend_id
from ucm.store.inspect.speed import own_folder
from ucm.store.tiers.posix.revalidate import doubt, is_there_now

_POLL_S: Final = 0.002
_RACES: Final = 24
_RACE_S: Final = 0.2
_SHORT_S: Final = 0.25


class PeerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds until the peer sees it; None if it did not within `limit_s`. `asked_again` is how UCM
    looks for what it has reason to expect. Of `num_races`, files that appeared just as they were
    looked for, `num_unseen` stayed unseen until their directory was touched, and
    `num_unseen_after_touch` even then."""

    peer: str
    id: str
    limit_s: float
    new_file_s: float | None
    after_miss_s: float | None
    asked_again_s: float | None
    removed_s: float | None
    num_races: int
    num_unseen: int
    num_unseen_after_touch: int


def look_from_peer(backend: str, peer: str, *, limit_s: float) -> PeerFacts:
    """`peer` is the same directory by the other mount. `limit_s` bounds each wait. Raises TierError
    or OSError."""
    with own_folder(backend) as folder:
        theirs = f"{peer}/{os.path.basename(folder)}"
        _wait(lambda: is_there_now(theirs, below=peer), limit_s)
        new_file_s = _seen(folder, theirs, "new", limit_s, os.path.lexists, asked_before=False)
        removed_s = None
        if new_file_s is not None:
            os.unlink(f"{folder}/new")
            removed_s = _wait(lambda: not os.path.lexists(f"{theirs}/new"), limit_s)
        after_miss_s = _seen(folder, theirs, "missed", limit_s, os.path.lexists)
        asked_again_s = _seen(
            folder, theirs, "expected", limit_s, lambda path: is_there_now(path, below=theirs)
        )
        unseen = [_race(folder, theirs, number, peer) for number in range(_RACES)]
    return PeerFacts(
        peer=peer,
        id=backend_id(peer),
        limit_s=limit_s,
        new_file_s=new_file_s,
        after_miss_s=after_miss_s,
        asked_again_s=asked_again_s,
        removed_s=removed_s,
        num_races=_RACES,
        num_unseen=sum(each > 0 for each in unseen),
        num_unseen_after_touch=sum(each > 1 for each in unseen),
    )


def _seen(
    folder: str,
    theirs: str,
    name: str,
    limit_s: float,
    look: Callable[[str], bool],
    *,
    asked_before: bool = True,
) -> float | None:
    path = f"{theirs}/{name}"
    if asked_before:
        look(path)
    _write(f"{folder}/{name}")
    return _wait(lambda: look(path), limit_s)


def _race(folder: str, theirs: str, number: int, peer: str) -> int:
    """How often the file was not seen in time: at first, and when its directory was touched."""
    name = f"race-{number}"
    path = f"{theirs}/{name}"

    def look() -> bool:
        return is_there_now(path, below=peer)

    _write(f"{folder}/.{name}")
    look()
    os.rename(f"{folder}/.{name}", f"{folder}/{name}")
    if _wait(look, _RACE_S) is not None:
        return 0
    doubt(path, below=peer)
    return 1 if _wait(look, _SHORT_S) is not None else 2


def _wait(condition: Callable[[], bool], limit_s: float) -> float | None:
    started_s = time.monotonic()
    while True:
        if condition():
            return round(time.monotonic() - started_s, 4)
        if time.monotonic() - started_s > limit_s:
            return None
        time.sleep(_POLL_S)


def _write(path: str) -> None:
    with open(path, "xb") as file:
        file.write(b"x")
