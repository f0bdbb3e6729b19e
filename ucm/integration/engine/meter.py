"""Counts what a rank's copies move and how long they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ucm.integration.copies.jobs import CopyJob, Direction
from ucm.integration.engine.counts import Counts
from ucm.integration.engine.facts import EngineFacts
from ucm.store.blocks.page_layout import RankShare

_BYTES = {Direction.LOAD: "ucm_loaded_bytes", Direction.DUMP: "ucm_dumped_bytes"}
_SECONDS = {Direction.LOAD: "ucm_load_seconds", Direction.DUMP: "ucm_dump_seconds"}


@dataclass(eq=False)
class _Copy:
    """One job's: what it moves, and how long it took up to now."""

    direction: Direction
    nbytes: int
    took_s: float = 0.0


class CopyMeter:
    """Used by the rank's thread alone. `shares` are those of the engine's targets."""

    def __init__(self, stats: Counts, facts: EngineFacts, shares: Sequence[RankShare]) -> None:
        self._stats = stats
        # Of one of vLLM's blocks, of each target.
        self._block_bytes: list[int] = []
        for target, share in zip(facts.targets, shares, strict=True):
            geometry = facts.geometry_of(target)
            num_rows = len(share.layers) * len(share.heads)
            num_units = target.block_tokens // geometry.unit_tokens
            if target.field is not None:
                num_units = geometry.num_units  # one block is all of a page
            self._block_bytes.append(num_rows * num_units * geometry.unit_bytes)
        self._begun: dict[int, _Copy] = {}

    def began(self, job: CopyJob, direction: Direction) -> None:
        nbytes = sum(len(part.block_ids) * self._block_bytes[part.target] for part in job.parts)
        self._begun[job.job_id] = _Copy(direction, nbytes)

    def failed(self, job_id: int) -> None:
        self._begun.pop(job_id, None)

    def ended(self, job_id: int) -> float:
        """How long it took. Jobs that failed, or that were left to another rank, have moved nothing
        and took no time."""
        copy = self._begun.pop(job_id, None)
        if copy is None:
            return 0.0
        self._stats.count(_BYTES[copy.direction], copy.nbytes)
        return copy.took_s

    def busy(self, seconds: Mapping[Direction, float]) -> None:
        """So long were copies of each direction under way since this was last told, which is before
        it is told what has ended. Those of one direction share its time."""
        for direction, busy_s in seconds.items():
            self._stats.count(_SECONDS[direction], busy_s)
            copies = [copy for copy in self._begun.values() if copy.direction is direction]
            for copy in copies:
                copy.took_s += busy_s / len(copies)
