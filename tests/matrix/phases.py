"""What a node cache is at while storage has a fault, as a user of the store sees it."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from tests.store.api.whole_store import dump, load, rows, status_of, whole_blocks
from tests.store.node.support import Place, wait_until
from ucm.errors import TaskFailed, TierError
from ucm.store.node import protocol as p
from ucm.store.pipeline import UcmPipelineStore

IO_TIMEOUT_MS: Final = 500
TIMEOUT_S: Final = 4.0
# What a request may take: three questions of the store, none of which takes longer than told.
REQUEST_S: Final = 3 * TIMEOUT_S + 3.0
BACK_S: Final = 10.0
STORED: Final = [f"stored {i}".encode() for i in range(6)]
UNTOUCHED: Final = [f"untouched {i}".encode() for i in range(6)]
NEW: Final = [f"new {i}".encode() for i in range(6)]

# Counters that say why something was not read, written or found.
_REASONS: Final = ("write_failed_", "dump_dropped_", "read_", "lookup_ended_")
_NO_REASONS: Final = ("hit", "absent", "never_stored", "aborted")
# What says that calls hang: they have not failed, and may be done in the end.
_HANGING: Final = ("reads_overdue", "writes_overdue")
# What a client is told beside the counters.
_TOLD: Final = re.compile(r"storage could not tell about some blocks: (\w+)|(has not answered) for")


def open_here(place: Place, **changes: Any) -> UcmPipelineStore:
    """By the path that has the fault."""
    return whole_blocks(
        place,
        posix_io_timeout_ms=IO_TIMEOUT_MS,
        posix_retry_ms=100,
        posix_recheck_s=1,
        posix_quarantine_per_minute=1000,
        min_free_gb=0.0001,
        timeout_ms=int(TIMEOUT_S * 1000),
        **changes,
    )


def open_elsewhere(place: Place, folder: str, **changes: Any) -> UcmPipelineStore:
    """Another node, whose own way to the storage is good."""
    return whole_blocks(
        place,
        storage_backends=folder,
        node_cache_socket=place.settings("b").socket_path,
        **changes,
    )


def request(store: UcmPipelineStore, ids: Sequence[bytes]) -> int:
    """As an engine asks for a prompt: what can't be loaded is computed, and dumped. Returns how
    many blocks were loaded; what is loaded is right, and nothing takes longer than its deadline."""
    started_s, ids = time.monotonic(), list(ids)
    hits = store.lookup_on_prefix(ids) + 1
    try:
        assert load(store, ids[:hits]) == rows(ids[:hits])
    except TaskFailed:
        hits = 0
    with suppress(TaskFailed):
        dump(store, ids[hits:])
    assert time.monotonic() - started_s < REQUEST_S
    return hits


def readable(store: UcmPipelineStore, ids: Sequence[bytes]) -> int:
    """How many can be loaded, each of which is right."""
    num = 0
    for each in ids:
        with suppress(TaskFailed):
            assert load(store, [each]) == rows([each])
            num += 1
    return num


def is_saved(store: UcmPipelineStore, ids: Sequence[bytes]) -> bool:
    """Whether all are in storage, after they were dumped once more."""
    try:
        request(store, ids)
        store.flush(1.0)
    except TierError:
        return False
    return True


def counted(status: p.Status) -> Counter[str]:
    """How often a node cache has given each reason."""
    found: Counter[str] = Counter()
    for name, count in status.counters.items():
        prefix = next((each for each in _REASONS if name.startswith(each)), None)
        if prefix is not None and (word := name.removeprefix(prefix)) not in _NO_REASONS:
            found["timeout" if word == "overdue" else word] += count
    found["timeout"] += sum(status.queues[name] for name in _HANGING)
    return found


def told(log: str) -> Counter[str]:
    """The same of what clients were told."""
    return Counter(word or "timeout" for word, _ in _TOLD.findall(log))


class Bench:
    """A place whose storage `begin` and `end` give and take a fault. `folder` is that storage as
    another node sees it, which has none. `log` is what this process has logged so far."""

    def __init__(
        self,
        place: Place,
        folder: str,
        begin: Callable[[], None],
        end: Callable[[], None],
        log: Callable[[], str],
    ) -> None:
        self.place, self.folder, self.begin, self.end, self.log = place, folder, begin, end, log
        self.said: Counter[str] = Counter()

    def with_fault(self, act: Callable[[int], object]) -> None:
        """`act`, twice, while there is the fault. Notes which reasons were given."""
        before = self._reasons()
        self.begin()
        try:
            # What is remembered, as free space is, is asked for anew by then.
            time.sleep(1.1)
            act(0)
            # What hangs has become overdue by then.
            time.sleep(2.5 * IO_TIMEOUT_MS / 1000)
            act(1)
            self.note(before)
        finally:
            self.end()

    def note(self, before: Counter[str]) -> None:
        self.said = self._reasons() - before

    def _reasons(self) -> Counter[str]:
        """How often both nodes have said so, and clients were told."""
        found = told(self.log())
        for socket, folder in {"a": str(self.place.store), "b": self.folder}.items():
            settings = self.place.settings(socket)
            if os.path.exists(settings.socket_path):
                found += counted(status_of(self.place, socket=socket, storage_backends=(folder,)))
        return found


def dumping(bench: Bench) -> None:
    with open_here(bench.place) as here, open_elsewhere(bench.place, bench.folder) as other:
        assert is_saved(here, STORED)

        def act(turn: int) -> None:
            request(here, NEW[turn::2])
            readable(other, NEW)

        bench.with_fault(act)
        wait_until(lambda: is_saved(here, NEW), "all is stored", within_s=BACK_S)
        wait_until(lambda: readable(other, NEW) == len(NEW), "found elsewhere", within_s=BACK_S)
        assert readable(here, STORED) == len(STORED)


def loading(bench: Bench) -> None:
    with open_elsewhere(bench.place, bench.folder) as other:
        assert is_saved(other, [*STORED, *UNTOUCHED])
        with open_here(bench.place) as here:
            bench.with_fault(lambda turn: request(here, STORED[turn::2]))
            _hits_are_back(here)
        assert readable(other, [*STORED, *UNTOUCHED]) == len([*STORED, *UNTOUCHED])


def looking_up(bench: Bench) -> None:
    with open_elsewhere(bench.place, bench.folder) as other:
        assert is_saved(other, [*STORED, *UNTOUCHED])
        with open_here(bench.place) as here:

            def look(turn: int) -> None:
                started_s = time.monotonic()
                here.lookup(STORED)
                assert not any(here.lookup(NEW))
                assert time.monotonic() - started_s < REQUEST_S

            bench.with_fault(look)
            _hits_are_back(here)


def starting(bench: Bench) -> None:
    """On what another node has stored."""
    with open_elsewhere(bench.place, bench.folder) as other:
        assert is_saved(other, [*STORED, *UNTOUCHED])
        _start(bench)


def starting_first(bench: Bench) -> None:
    """Where nothing is yet."""
    _start(bench)
    with open_elsewhere(bench.place, bench.folder) as other:
        assert readable(other, STORED) == len(STORED)


def _start(bench: Bench) -> None:
    bench.begin()
    try:
        with open_here(bench.place) as here:
            request(here, STORED[::2])
            time.sleep(2.5 * IO_TIMEOUT_MS / 1000)
            request(here, STORED[1::2])
            bench.note(Counter())
            bench.end()
            wait_until(lambda: is_saved(here, STORED), "all is stored", within_s=BACK_S)
            if is_saved(here, UNTOUCHED):
                _hits_are_back(here)
    finally:
        bench.end()


def _hits_are_back(store: UcmPipelineStore) -> None:
    """Also of what was in nobody's memory."""

    def are_back() -> bool:
        return [request(store, each) for each in (STORED, UNTOUCHED)] == [6, 6]

    wait_until(are_back, "hits are back", within_s=BACK_S)
