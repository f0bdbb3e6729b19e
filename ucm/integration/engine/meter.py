"""Counts what a rank's copies move and how long they take."""

from __future__ import annotations

from collections.abc import Mapping

from ucm.integration.copies.jobs import CopyJob, Direction
from ucm.integration.engine.counts import Counts
from ucm.store.blocks.page_layout import PageGeometry, RankShare

_BYTES = {Direction.LOAD: "ucm_loaded_bytes", Direction.DUMP: "ucm_dumped_bytes"}
_SECONDS = {Direction.LOAD: "ucm_load_seconds", Direction.DUMP: "ucm_dump_seconds"}


class CopyMeter:
    """Used by the rank's thread alone. `block_tokens` are the tokens of one of vLLM's blocks."""

    def __init__(
        self, stats: Counts, share: RankShare, *, geometry: PageGeometry, block_tokens: int
    ) -> None:
        self._stats = stats
        num_units = block_tokens // geometry.unit_tokens
        num_rows = len(share.layers) * len(share.heads)
        self._block_bytes = num_rows * num_units * geometry.unit_bytes
        self._begun: dict[int, tuple[Direction, int]] = {}

    def began(self, job: CopyJob, direction: Direction) -> None:
        num_blocks = sum(len(part.block_ids) for part in job.parts)
        self._begun[job.job_id] = direction, num_blocks * self._block_bytes

    def failed(self, job_id: int) -> None:
        self._begun.pop(job_id, None)

    def ended(self, job_id: int) -> None:
        """Jobs that failed, or that were left to another rank, have moved nothing."""
        if (begun := self._begun.pop(job_id, None)) is not None:
            direction, nbytes = begun
            self._stats.count(_BYTES[direction], nbytes)

    def busy(self, seconds: Mapping[Direction, float]) -> None:
        for direction, busy_s in seconds.items():
            self._stats.count(_SECONDS[direction], busy_s)
