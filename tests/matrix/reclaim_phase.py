"""A store at its limit: what is written needs room, and reclaim has the fault."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from tests.matrix.phases import BACK_S, Bench, open_elsewhere, open_here, readable, request
from tests.store.api.whole_store import status_of
from tests.store.node.support import wait_until
from ucm.errors import TaskFailed
from ucm.store.pipeline import UcmPipelineStore

FILE_BYTES: Final = 16384
LIMIT_FILES: Final = 96
LIMITED: Final = {
    "posix_capacity_gb": LIMIT_FILES * FILE_BYTES / (1 << 30),
    "posix_gc_grace_sec": 1.0,
    "posix_gc_check_interval_sec": 0.5,
    "posix_gc_heartbeat_interval_sec": 0.2,
    "posix_gc_stale_threshold_sec": 2.0,
}
BLOCKS: Final = 8
# More than a limit leaves that is reclaimed from seven tenths of it on.
PROMPTS_AT_ONCE: Final = 5
MOST_PROMPTS: Final = 100
_LEAVES: Final = 3


def prompt(name: str) -> list[bytes]:
    return [f"{name} block {i}".encode() for i in range(BLOCKS)]


def page_files(folder: str, level: int = 0) -> Iterator[str]:
    """What lies where pages do, `*/??/??/*`. A glob takes a core for itself, so often as it is."""
    with suppress(FileNotFoundError):
        for entry in list(os.scandir(folder)):
            if level == _LEAVES:
                yield entry.path
            elif (level == 0 or len(entry.name) == 2) and entry.is_dir():
                yield from page_files(entry.path, level + 1)


@contextmanager
def kept_limit(folder: str) -> Iterator[None]:
    """Looks at the files of pages all the time, those that are being written among them. What was
    listed and is still there afterwards was there together: meanwhile some go, and others come."""
    most, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.05):
            nbytes = 0
            for path in list(page_files(folder)):
                with suppress(FileNotFoundError):
                    nbytes += os.stat(path).st_size
            most = max(most, nbytes)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    assert most <= LIMIT_FILES * FILE_BYTES, f"{most / FILE_BYTES} files of {LIMIT_FILES}"


def counter(bench: Bench, name: str) -> int:
    return int(status_of(bench.place).counters.get(name, 0))


def fill(bench: Bench, here: UcmPipelineStore) -> None:
    """Until something was reclaimed."""
    for number in range(MOST_PROMPTS):
        request(here, prompt(f"old {number}"))
        time.sleep(0.1)
        if counter(bench, "reclaimed_files_capacity"):
            return
    raise AssertionError("nothing is reclaimed")


def is_hit(store: UcmPipelineStore, ids: list[bytes]) -> bool:
    with suppress(TaskFailed):
        return store.lookup_on_prefix(ids) + 1 == len(ids) == readable(store, ids)
    return False


def is_found(store: UcmPipelineStore, ids: list[bytes]) -> bool:
    """Asked all the time, two cores do little else."""
    time.sleep(0.1)
    return is_hit(store, ids)


def reclaiming(bench: Bench) -> None:
    """Two nodes keep the limit; the one that reclaims has the fault."""
    with kept_limit(bench.folder), open_here(bench.place, **LIMITED) as here:
        wait_until(lambda: counter(bench, "reclaim_leases"), "it reclaims")
        with open_elsewhere(bench.place, bench.folder, **LIMITED) as other:
            fill(bench, here)

            def act(turn: int) -> None:
                for number in range(1 if turn else PROMPTS_AT_ONCE):
                    request(here, prompt(f"while {turn} {number}"))
                readable(other, prompt(f"while {turn} 0"))

            bench.with_fault(act)
            # Once: nobody meets it again, and it is stored.
            request(here, prompt("new"))
            wait_until(lambda: is_found(other, prompt("new")), "found elsewhere", within_s=BACK_S)
            assert readable(here, prompt("new")) == BLOCKS
