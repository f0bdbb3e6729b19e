"""What the records of a store's backends say of pages that are not there: when they went."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ucm.store.blocks.keys import Key
from ucm.store.inspect.walk import NamespaceFolder
from ucm.store.tiers.posix.plain_files import NotPlain
from ucm.store.tiers.posix.reclaim_record import mark_of
from ucm.store.tiers.posix.reclaim_record_files import reclaims_on_record


@dataclass(frozen=True)
class Reclaims:
    """`otherwise` is what else may be true of a page that is neither there nor on record."""

    otherwise: str
    _times_ns: Mapping[int, int]
    _key_id: bytes

    @classmethod
    def of(cls, folders: Sequence[NamespaceFolder], keys: Sequence[Key]) -> Reclaims:
        """`folders` are those of one namespace, one in each backend. Never raises for what storage
        does."""
        key_id = folders[0].key_id
        marks = [mark_of(key, key_id) for key in keys]
        times_ns: dict[int, int] = {}
        since_ns = 0
        problem = ""
        for folder in folders:
            try:
                found = reclaims_on_record(folder.backend, marks)
            except NotPlain as error:
                problem = f"the record in {folder.backend} {error}"
                continue
            except OSError as error:
                problem = f"the record in {folder.backend} can't be read: {error.strerror or error}"
                continue
            since_ns = max(since_ns, found.since_ns or 0)
            for mark, time_ns in found.times_ns.items():
                times_ns[mark] = max(time_ns, times_ns.get(mark, 0))
        return cls(_otherwise(since_ns, problem), times_ns, key_id)

    def when(self, key: Key) -> str:
        """When it was reclaimed last, for people; empty where that is not on record."""
        time_ns = self._times_ns.get(mark_of(key, self._key_id))
        return "" if time_ns is None else _minute(time_ns)


def _otherwise(since_ns: int, problem: str) -> str:
    if problem:
        return f"never stored, or reclaimed: {problem}"
    if not since_ns:
        return "never stored; no reclaim is on record"
    return f"never stored, or gone before the record of reclaim begins at {_minute(since_ns)}"


def _minute(time_ns: int) -> str:
    """Pages of one prompt go within minutes, so that they are told in one line."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time_ns / 1e9))
