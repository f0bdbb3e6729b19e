"""The pages of one rank in the store: three questions, each with an answer in bounded time.

    stored(keys)        how far they can be loaded
    load(keys, pages)   which were, into memory of the caller
    dump(keys, pages)   which can be loaded now, by anybody

What goes wrong is counted, said once a minute, and a page less: nothing is raised here. Two clients
of the node cache, one for each direction, so that loads, for which a request waits, don't stand
behind dumps, and have a shorter time.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from ucm.config.settings import Settings
from ucm.errors import NodeUnavailable, UcmError
from ucm.integration.sglang.call import Call
from ucm.integration.sglang.counts import PageCounts
from ucm.integration.sglang.identity import HostPage
from ucm.outcome import Outcome
from ucm.store.api.buffers import HostRow, Row
from ucm.store.api.driver import Driver, MakeSteps
from ucm.store.api.dumps import dump
from ucm.store.api.loads import Absent, bring, find
from ucm.store.api.pages import Pages, Part
from ucm.store.api.questions import Questions, batch_blocks
from ucm.store.api.shards import BlockNames
from ucm.store.api.steps import Steps
from ucm.store.blocks import namespace
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p

logger = logging.getLogger(__name__)

# SGLang gives a thread that is to stop 10 s; one that still waits then is an error of the server's.
MAX_CALL_S: Final = 9.0
# A task ends in its time by itself; this is for a thread that gets no CPU.
_GRACE_S: Final = 1.0
# A cold prompt ends at its first page.
_FIRST_FIND: Final = 64
_MAX_FIND: Final = 1 << 14
_HERE: Final = p.IN_MEMORY | p.QUEUED | p.IN_STORAGE
_T = TypeVar("_T")


@dataclass
class _Reached:
    """How far a question has come when its time is over."""

    num_stored: int = 0
    reason: Outcome = Outcome.FINE


class PageStore:
    """Any thread may ask."""

    def __init__(
        self, settings: Settings, page: HostPage, counts: PageCounts, *, stores: bool
    ) -> None:
        """`stores` is False on a rank whose pages another one stores."""
        self._counts = counts
        self._page = page
        self._names = BlockNames(namespace.fingerprint(page.manifest()))
        name = f"sglang-{os.getpid()}-{uuid.uuid4().hex}"
        self._load_timeout_s = _task_s(settings.lookup_timeout_ms)
        self._dump_timeout_s = _task_s(settings.dump_timeout_ms)
        self._loads = Driver(
            settings.store, page, name=f"{name}-load", timeout_s=self._load_timeout_s
        )
        self._dumps = (
            Driver(settings.store, page, name=f"{name}-dump", timeout_s=self._dump_timeout_s)
            if stores
            else None
        )

    def wait_opened(self) -> None:
        """Until the node cache has opened the namespace. Raises ConfigError if that can't work; one
        that doesn't answer yet may do so later."""
        try:
            for driver in self._drivers():
                driver.wait_opened()
        except NodeUnavailable as error:
            logger.warning("nothing is loaded or stored until it is there: %s", error)

    def stored(self, names: Sequence[str]) -> int:
        keys, reached = self._keys(names), _Reached()
        why = self._run(
            self._loads, self._load_timeout_s, partial(_stored, keys=keys, reached=reached)
        )
        why = why or reached.reason
        if why:
            self._counts.missed("not_looked_up", why, len(keys) - reached.num_stored)
        return reached.num_stored

    def load(self, names: Sequence[str], pages: Sequence[HostRow]) -> list[bool]:
        keys, call, began_s = self._keys(names), Call(pages), time.monotonic()
        absent: list[Absent] = []
        steps = partial(_load, keys=keys, call=call, pages=self._loads.shared.pages, absent=absent)
        why = self._run(self._loads, self._load_timeout_s, partial(self._batched, steps))
        filled = call.end()
        num_loaded = sum(filled)
        why = why or (absent[0].reason if absent else Outcome.FINE)
        self._note("loaded", why, num_loaded, len(filled), began_s)
        return filled

    def dump(self, names: Sequence[str], pages: Sequence[HostRow]) -> list[bool]:
        if self._dumps is None:
            return [True] * len(names)
        keys, call, began_s = self._keys(names), Call(pages), time.monotonic()
        parts = [
            Part(name.encode(), key, 0, row)
            for name, key, row in zip(names, keys, call.rows(), strict=True)
        ]
        steps = partial(dump, parts=parts, shared=self._dumps.shared)
        why = self._run(self._dumps, self._dump_timeout_s, partial(self._batched, steps))
        call.end()
        self._note("stored", why, 0 if why else len(parts), len(parts), began_s)
        return [not why] * len(parts)

    def close(self) -> None:
        for driver in self._drivers():
            driver.close()

    # -- parts -----------------------------------------------------------------------------

    def _drivers(self) -> list[Driver]:
        return [self._loads] if self._dumps is None else [self._loads, self._dumps]

    def _keys(self, names: Sequence[str]) -> list[Key]:
        return [self._names.key(name.encode()) for name in names]

    def _batched(self, steps: Callable[..., Steps[_T]], questions: Questions) -> Steps[_T]:
        capacity_bytes = self._loads.shared.pages.capacity_bytes
        return steps(questions, batch=batch_blocks(self._page.page_bytes, capacity_bytes))

    def _run(self, driver: Driver, timeout_s: float, make_steps: MakeSteps) -> Outcome:
        """Why they did not come to their end; FINE if they did."""
        why = driver.why_not_ready
        if why:
            return why
        late_s = time.monotonic() + timeout_s
        try:
            has_ended = driver.start(make_steps).wait(timeout_s + _GRACE_S)
        except UcmError as error:
            why = Outcome.TIMEOUT if time.monotonic() >= late_s else Outcome.IO_ERROR
            self._counts.missed("failed", why, 0, error)
            return why
        return Outcome.FINE if has_ended else Outcome.TIMEOUT

    def _note(self, what: str, why: Outcome, num_done: int, num_asked: int, began_s: float) -> None:
        self._counts.done(what, num_done)
        if num_done < num_asked:
            self._counts.missed(f"not_{what}", why, num_asked - num_done)
        self._counts.note_transfer(
            is_load=what == "loaded",
            num_pages=num_done,
            nbytes=num_done * self._page.page_bytes,
            took_s=time.monotonic() - began_s,
        )


def _task_s(timeout_ms: int) -> float:
    return min(timeout_ms / 1000, MAX_CALL_S - _GRACE_S)


def _stored(questions: Questions, keys: Sequence[Key], reached: _Reached) -> Steps[None]:
    """In growing steps, up to the first page that is nowhere."""
    start, count = 0, _FIRST_FIND
    while start < len(keys):
        reply = yield from find(questions, keys[start : start + count], storage=False)
        for place in reply.places:
            if not place & _HERE:
                reached.reason = reply.reason
                return
            reached.num_stored += 1
        start, count = start + count, min(count * 8, _MAX_FIND)


def _load(
    questions: Questions,
    keys: Sequence[Key],
    call: Call,
    *,
    batch: int,
    pages: Pages,
    absent: list[Absent],
) -> Steps[None]:
    rows_of: dict[Key, list[Row]] = {}
    for key, row in zip(keys, call.rows(), strict=True):
        rows_of.setdefault(key, []).append(row)

    def copy(batch: Sequence[Key], offsets: Sequence[int]) -> None:
        for key, offset in zip(batch, offsets, strict=False):
            for row in rows_of[key]:
                row.load_from(pages.shard_address(offset, 0))

    first = yield from bring(questions, list(rows_of), batch, copy)
    if first is not None:
        absent.append(first)
