"""What a check of every page has found, of directories and buckets."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final

import msgspec

from ucm.store.blocks.page_key import PageKey
from ucm.store.inspect.page_check import Condition
from ucm.store.inspect.walk import FoundManifest, Wrong

# Further ones are only counted.
_MAX_LISTED: Final = 1_000


class BadFile(msgspec.Struct, frozen=True, kw_only=True):
    """`condition` is a `Condition`; `done` says what was done about it, empty for nothing."""

    path: str
    condition: str
    why: str
    done: str = ""


class Verified(msgspec.Struct, kw_only=True):
    """Of all backends together; manifests count as damaged or unreadable as pages do. `files` are
    the first of those that are damaged or could not be read. `num_bytes` were read and found
    right."""

    num_whole: int = 0
    num_bytes: int = 0
    num_damaged: int = 0
    num_unreadable: int = 0
    num_sealed_by_another_key: int = 0
    num_other_version: int = 0
    num_temporary: int = 0
    num_misplaced: int = 0
    num_quarantined: int = 0
    seconds: float = 0.0
    files: list[BadFile] = msgspec.field(default_factory=list)


@dataclass(frozen=True)
class VerifyRules:
    """`page_key` is that of the settings; with `quarantine` damaged files are moved aside."""

    page_key: PageKey | None = None
    quarantine: bool = False
    num_threads: int = 2


@dataclass
class VerifiedCounts:
    """Of all threads of one call."""

    found: Verified = field(default_factory=Verified)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fine(self, condition: Condition, nbytes: int) -> None:
        """Neither damaged nor unreadable."""
        with self._lock:
            if condition in (Condition.WHOLE, Condition.SEALED):
                self.found.num_bytes += nbytes
            self.found.num_whole += condition is Condition.WHOLE
            self.found.num_sealed_by_another_key += condition is Condition.SEALED
            self.found.num_other_version += condition is Condition.OTHER_VERSION

    def no_page(self, *, is_temporary: bool, is_misplaced: bool) -> None:
        with self._lock:
            self.found.num_temporary += is_temporary
            self.found.num_misplaced += is_misplaced

    def manifest(self, path: str, found: FoundManifest) -> None:
        """Counts it if something is wrong with it."""
        if found.wrong is None:
            return
        why = found.why
        if found.wrong is Wrong.DAMAGED:
            why += ": remove it, and the next engine of its model writes it anew"
        self.bad(path, Condition(found.wrong.value), why)

    def bad(self, path: str, condition: Condition, why: str, done: str = "") -> None:
        with self._lock:
            self.found.num_damaged += condition is Condition.DAMAGED
            self.found.num_unreadable += condition is Condition.UNREADABLE
            self.found.num_quarantined += done.startswith("moved")
            if len(self.found.files) < _MAX_LISTED:
                bad = BadFile(path=path, condition=condition.value, why=why, done=done)
                self.found.files.append(bad)
