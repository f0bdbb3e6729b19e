"""The node cache as vLLM's tiering needs it: questions and jobs that run on a thread of their own.

Nothing here waits but `drain`, which vLLM calls to wait. Each question and job ends in its time,
well or not, and touches no memory of vLLM's afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from ucm.config.settings import Settings
from ucm.errors import TaskFailed, UcmError
from ucm.integration.engine.gauges import NodeGauges
from ucm.integration.tiering.counts import TierCounts, lost_as
from ucm.integration.tiering.rows import HostRows, RowNames, RowShape
from ucm.integration.tiering.transfers import PlacedRow, RowJob, load, promised, store
from ucm.store.api.driver import Driver
from ucm.store.api.loads import find
from ucm.store.api.tasks import Task
from ucm.store.blocks.keys import Key
from ucm.store.blocks.namespace import Manifest
from ucm.store.client.session import NodeSession
from ucm.store.node import protocol as p

# A job ends in its time; this is for the case that its thread is stuck in a copy.
_GRACE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Ended:
    """A job of vLLM's, by its number."""

    number: int
    job: RowJob
    is_load: bool
    took_s: float


@dataclass(frozen=True, slots=True)
class _Begun:
    job: RowJob
    task: Task | None
    is_load: bool
    began_s: float


class _NodeNumbers:
    """The node cache's own. On the store's thread."""

    def __init__(self, counts: TierCounts) -> None:
        self._counts = counts
        self._gauges: NodeGauges | None = None

    def step(self, session: NodeSession) -> None:
        self._gauges = self._gauges or NodeGauges(session, self._counts)
        self._gauges.step()

    def on_status(self, status: p.Status) -> None:
        if self._gauges is not None:
            self._gauges.on_status(status)


class RowStore:
    """Owned by the engine's thread. `names` are those of the namespace of now."""

    def __init__(
        self,
        settings: Settings,
        rows: HostRows,
        manifest: Manifest,
        *,
        name: str,
        counts: TierCounts,
    ) -> None:
        """`name` tells this engine from all others."""
        self._settings = settings
        self._rows = rows
        self._name = name
        self._counts = counts
        self._number = 0
        self._jobs: dict[int, _Begun] = {}
        self._load_s = settings.lookup_timeout_ms / 1000
        self._store_s = settings.dump_timeout_ms / 1000
        self._open(manifest)

    def _open(self, manifest: Manifest) -> None:
        self._number += 1
        self.names = RowNames(manifest)
        self._driver = Driver(
            self._settings.store,
            RowShape(self._rows.row_bytes, manifest),
            name=f"{self._name}/{self._number}",
            timeout_s=self._load_s,
            patience_s=self._store_s,
        )
        numbers = _NodeNumbers(self._counts)
        self._driver.on_status = numbers.on_status
        self._driver.on_step = numbers.step

    @property
    def is_ready(self) -> bool:
        """Whether somebody answers: else there is nothing to ask."""
        return self._driver.is_ready

    # -- questions -------------------------------------------------------------------------

    def find(self, keys: Sequence[Key]) -> Task:
        """Where are these? Raises UcmError if nobody can be asked."""
        return self._driver.start(
            partial(find, keys=list(keys), storage=False), timeout_s=self._load_s
        )

    def wait_for(self, keys: Sequence[Key], wait_s: float) -> Task:
        """Until they are there. Raises UcmError as `find`."""
        return self._driver.start(partial(promised, keys=list(keys)), timeout_s=wait_s)

    def withdraw(self, question: Task) -> None:
        """Nobody waits for its answer any more."""
        self._driver.withdraw(question)

    # -- jobs ------------------------------------------------------------------------------

    def load(self, number: int, keys: Sequence[Key], rows: Sequence[int]) -> None:
        """Pages into rows, by their numbers."""
        found = zip(keys, rows, strict=True)
        self._begin(number, [PlacedRow(key, self._rows.row(row)) for key, row in found])

    def store(
        self, number: int, keys: Sequence[Key], rows: Sequence[int], parents: Sequence[bytes]
    ) -> None:
        """Rows into pages, each written after that of its parent."""
        found = zip(keys, rows, parents, strict=True)
        placed = [PlacedRow(key, self._rows.row(row), parent) for key, row, parent in found]
        self._begin(number, placed, is_load=False)

    def refuse(self, number: int) -> None:
        """A job that nothing is done of."""
        self._jobs[number] = _Begun(RowJob([]), None, False, time.monotonic())

    def _begin(self, number: int, rows: Sequence[PlacedRow], *, is_load: bool = True) -> None:
        """Without a task it ends at once, and nothing is done of it."""
        job = RowJob(rows)
        task = None
        if not self._driver.is_silent:
            with suppress(UcmError):
                task = self._start(job, is_load=is_load)
        self._jobs[number] = _Begun(job, task, is_load, time.monotonic())

    def _start(self, job: RowJob, *, is_load: bool) -> Task:
        steps, timeout_s = (load, self._load_s) if is_load else (store, self._store_s)
        pages, row_bytes = self._driver.shared.pages, self._rows.row_bytes
        return self._driver.start(
            partial(steps, job=job, pages=pages, row_bytes=row_bytes), timeout_s=timeout_s
        )

    def take_ended(self) -> list[Ended]:
        """Since the last call."""
        ended = [
            number
            for number, begun in self._jobs.items()
            if begun.task is None or begun.task.has_ended
        ]
        return [self._end(number, self._jobs.pop(number)) for number in ended]

    def _end(self, number: int, begun: _Begun) -> Ended:
        job = begun.job
        missing = [row.key for row in job.rows if row.key not in job.done]
        if begun.is_load:
            self._counts.count("ucm_tiering_loaded_rows", len(job.done))
            for key in missing:
                self._counts.count("ucm_tiering_lost_rows", reason=lost_as(job.reasons.get(key)))
        else:
            self._counts.count("ucm_tiering_stored_rows", len(job.done))
            self._counts.count("ucm_tiering_dropped_rows", len(missing))
        return Ended(number, job, begun.is_load, time.monotonic() - begun.began_s)

    def drain(self) -> None:
        """Until every job has ended. Raises TaskFailed if one does not: its memory is in use."""
        for begun in self._jobs.values():
            if begun.task is not None:
                _wait(begun.task)

    # -- life ------------------------------------------------------------------------------

    def reopen(self, manifest: Manifest) -> None:
        """Everything that follows is of another namespace. To be drained before."""
        self._close_driver()
        self._open(manifest)

    def close(self) -> None:
        """Raises TaskFailed if a copy does not end."""
        self._close_driver()

    def _close_driver(self) -> None:
        self._driver.close()
        if not self._driver.has_ended:
            raise TaskFailed("the store's thread is stuck in a copy: vLLM's memory is in use")


def _wait(task: Task) -> None:
    with suppress(UcmError):
        task.wait(max(0.0, task.deadline_s - time.monotonic()) + _GRACE_S)
    if not task.has_ended:
        raise TaskFailed("the store's thread is stuck in a copy: vLLM's memory is in use")


def result_of(task: Task) -> Any:
    """Of one that has ended; None if it has failed."""
    with suppress(UcmError):
        task.wait(0)
        return task.result
    return None
