"""What a second node sees of what this one does, where its mount of the same storage is at hand."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
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


def look_from_peer(backend: str, peer: str, *, limit_s: float, stop: Event) -> PeerFacts:
    """`peer` is the same directory by the other mount. `limit_s` bounds each wait; `stop` ends
    them. Raises TierError or OSError."""
    with own_folder(backend) as folder:
        return _PeerView(folder, peer, limit_s, stop).facts()


@dataclass(frozen=True)
class _PeerView:
    """`folder` is where files are made; the peer has it by the same name."""

    folder: str
    peer: str
    limit_s: float
    stop: Event

    @property
    def theirs(self) -> str:
        return f"{self.peer}/{os.path.basename(self.folder)}"

    def facts(self) -> PeerFacts:
        self._wait(lambda: is_there_now(self.theirs, below=self.peer), self.limit_s)
        new_file_s = self._seen("new", os.path.lexists, asked_before=False)
        removed_s = None
        if new_file_s is not None:
            os.unlink(f"{self.folder}/new")
            removed_s = self._wait(lambda: not os.path.lexists(f"{self.theirs}/new"), self.limit_s)
        after_miss_s = self._seen("missed", os.path.lexists)
        asked_again_s = self._seen("expected", self._is_there_now)
        unseen = [self._race(f"race-{number}") for number in range(_RACES)]
        return PeerFacts(
            peer=self.peer,
            id=backend_id(self.peer),
            limit_s=self.limit_s,
            new_file_s=new_file_s,
            after_miss_s=after_miss_s,
            asked_again_s=asked_again_s,
            removed_s=removed_s,
            num_races=_RACES,
            num_unseen=sum(each > 0 for each in unseen),
            num_unseen_after_touch=sum(each > 1 for each in unseen),
        )

    def _is_there_now(self, path: str) -> bool:
        return is_there_now(path, below=self.peer)

    def _seen(
        self, name: str, look: Callable[[str], bool], *, asked_before: bool = True
    ) -> float | None:
        path = f"{self.theirs}/{name}"
        if asked_before:
            look(path)
        _write(f"{self.folder}/{name}")
        return self._wait(lambda: look(path), self.limit_s)

    def _race(self, name: str) -> int:
        """How often the file was not seen in time: at first, and when its directory was touched."""
        path = f"{self.theirs}/{name}"
        _write(f"{self.folder}/.{name}")
        self._is_there_now(path)
        os.rename(f"{self.folder}/.{name}", f"{self.folder}/{name}")
        if self._wait(lambda: self._is_there_now(path), _RACE_S) is not None:
            return 0
        doubt(path, below=self.peer)
        seen_s = self._wait(lambda: self._is_there_now(path), _SHORT_S)
        return 1 if seen_s is not None else 2

    def _wait(self, condition: Callable[[], bool], limit_s: float) -> float | None:
        started_s = time.monotonic()
        while not self.stop.is_set():
            if condition():
                return round(time.monotonic() - started_s, 4)
            if time.monotonic() - started_s > limit_s:
                return None
            self.stop.wait(_POLL_S)
        return None


def _write(path: str) -> None:
    with open(path, "xb") as file:
        file.write(b"x")
