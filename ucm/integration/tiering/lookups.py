"""What requests ask of the tier: one question to the node cache for all rows of a request.

    lookup: later ──► flush, at the step's end ──► [wait for what is promised] ──► find ──► answer

vLLM asks row by row, and again in each step until it has its answers. They hold for the life of
the request. What has no answer in its time (`lookup_timeout_ms`, beside the wait for a promise) is
absent; so is everything while nobody answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from ucm.config.settings import Settings
from ucm.errors import UcmError
from ucm.integration.tiering.counts import TierCounts
from ucm.integration.tiering.promises import RowsPromised, WaitedGroup, awaited
from ucm.integration.tiering.row_store import RowStore, result_of
from ucm.outcome import Outcome
from ucm.store.api.tasks import Task
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p

_HERE = p.IN_MEMORY | p.QUEUED | p.IN_STORAGE


@dataclass(eq=False)
class _Request:
    """`asked` says of each row without an answer its group and where it ends. A request that is
    `bypassed` finds nothing and stores nothing."""

    promise: RowsPromised | None
    asked: dict[Key, tuple[int, int]] = field(default_factory=dict)
    answers: dict[Key, bool] = field(default_factory=dict)
    until_s: float = 0.0
    wait: Task | None = None
    find: Task | None = None
    found: tuple[Key, ...] = ()
    bypassed: bool = False


class RowLookups:
    """Owned by the engine's thread."""

    def __init__(
        self, store: RowStore, group: WaitedGroup, settings: Settings, counts: TierCounts
    ) -> None:
        self._store = store
        self._group = group
        self._counts = counts
        self._timeout_s = settings.lookup_timeout_ms / 1000
        self._max_finds = settings.max_lookups
        self._max_waits = settings.max_handoffs
        self._max_keys = settings.store.max_keys
        self._requests: dict[str, _Request] = {}
        # Those that have asked and have no answer yet, the longest waiting first.
        self._open: dict[str, _Request] = {}

    def begin(self, name: str, promise: RowsPromised | None = None) -> None:
        self._requests[name] = _Request(promise)

    def end(self, name: str) -> None:
        request = self._requests.pop(name, None)
        self._open.pop(name, None)
        if request is not None:
            self._withdraw(request)

    def is_bypassed(self, name: str) -> bool:
        request = self._requests.get(name)
        return request is not None and request.bypassed

    def bypass_all(self) -> None:
        """What is being computed now is not to be mixed with what is stored from here on."""
        for request in self._requests.values():
            request.bypassed = True
        self._open.clear()

    def lookup(self, name: str, key: Key, *, group: int, end: int) -> bool | None:
        """Whether the row is there; None if that is known later."""
        request = self._requests.setdefault(name, _Request(None))
        if name in self._open:
            self._go_on(request)
        answer = request.answers.get(key)
        if answer is not None:
            return answer
        now_s = time.monotonic()
        if request.bypassed:
            return self._answer(request, key, False, "bypassed")
        if not self._store.is_ready or (key in request.asked and now_s > request.until_s):
            return self._answer(request, key, False, "late")
        if not request.asked:
            request.until_s = now_s + self._timeout_s
        request.asked[key] = (group, end)
        self._open[name] = request
        return None

    def lost(self, name: str, keys: Iterable[Key]) -> None:
        """They were found, and could not be loaded."""
        request = self._requests.get(name)
        if request is not None:
            request.answers.update(dict.fromkeys(keys, False))

    def flush(self) -> None:
        """Asks for what was asked in this step."""
        for name, request in list(self._open.items()):
            self._go_on(request)
            if not request.asked:
                del self._open[name]
                self._withdraw(request)
        finds = sum(request.find is not None for request in self._open.values())
        waits = sum(request.wait is not None for request in self._open.values())
        for request in self._open.values():
            if request.wait is None and request.find is None:
                if request.promise is not None:
                    waits += self._wait(request, is_crowded=waits >= self._max_waits)
                if request.wait is None and finds < self._max_finds:
                    finds += self._find(request)

    # -- one request -------------------------------------------------------------------------

    def _wait(self, request: _Request, *, is_crowded: bool) -> bool:
        """Once: what has been waited for is there, or will not come."""
        promise, request.promise = request.promise, None
        assert promise is not None
        keys = awaited(promise, request.asked, self._group)
        if is_crowded or not keys:
            self._counts.count(
                "ucm_tiering_promises", outcome="crowded" if is_crowded else "other_prompt"
            )
            return False
        try:
            # The last ones: all others are there when these are.
            request.wait = self._store.wait_for(keys[-self._max_keys :], promise.wait_s)
        except UcmError:
            return False
        request.until_s = request.wait.deadline_s + self._timeout_s
        return True

    def _find(self, request: _Request) -> bool:
        request.found = tuple(islice(request.asked, self._max_keys))
        try:
            request.find = self._store.find(request.found)
        except UcmError:
            return False  # the answer is late
        request.until_s = max(request.until_s, request.find.deadline_s)
        return True

    def _go_on(self, request: _Request) -> None:
        if request.wait is not None and request.wait.has_ended:
            took_s = time.monotonic() - request.wait.began_s
            is_kept = result_of(request.wait) is Outcome.FINE
            request.wait = None
            self._counts.observe("ucm_tiering_wait_seconds", took_s)
            self._counts.count("ucm_tiering_promises", outcome="kept" if is_kept else "late")
        if request.find is not None and request.find.has_ended:
            found: p.Found | None = result_of(request.find)
            request.find = None
            places = found.places if found is not None else bytes(len(request.found))
            for key, place in zip(request.found, places, strict=True):
                is_here = bool(place & _HERE)
                if key not in request.answers:
                    self._answer(request, key, is_here, "found" if is_here else "absent")

    def _withdraw(self, request: _Request) -> None:
        """What would be waited for, and held in the node cache's memory, for nobody."""
        for question in (request.wait, request.find):
            if question is not None:
                self._store.withdraw(question)
        request.wait = request.find = None

    def _answer(self, request: _Request, key: Key, is_here: bool, word: str) -> bool:
        self._counts.count("ucm_tiering_asked_rows", answer=word)
        request.answers[key] = is_here
        request.asked.pop(key, None)
        return is_here
