"""What the scheduler side tells the ranks each step, and what they answer.

Both travel through vLLM's own messages: the metadata with the step, the answers added up over all
ranks before the scheduler side sees them. So the ranks need no channel of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from ucm.integration.copies.jobs import CopyJob


@dataclass(frozen=True)
class StepMetadata(KVConnectorMetadata):
    """One step. `loads` are asynchronous; `step_loads` feed this step's own forward pass, layer by
    layer. The device blocks of the jobs in `fence` may be overwritten by this step. `released`
    requests have no copies left: each rank reports them to vLLM as finished. A step that is `idle`
    computes nothing. One that `writes_before_fence` zeroes or copies blocks, which some of vLLM's
    runners do before they call any hook: what is in `fence` then may have read what is there now.
    The copies `at_once` of `dumps` end with the step: the next may give their blocks to others.
    A step that is `measured` has a number by which its end is reported.
    """

    generation: int = 0
    idle: bool = False
    loads: tuple[CopyJob, ...] = ()
    step_loads: tuple[CopyJob, ...] = ()
    dumps: tuple[CopyJob, ...] = ()
    at_once: tuple[int, ...] = ()
    fence: tuple[int, ...] = ()
    writes_before_fence: bool = False
    released: tuple[str, ...] = ()
    measured: int = 0


@dataclass
class RankReport(KVConnectorWorkerMetadata):
    """How many ranks have ended a job, and on how many it failed. `took_s`: for how long the
    slowest of them has copied; `measured` is the step's, see there."""

    ended: dict[int, int] = field(default_factory=dict)
    failed: dict[int, int] = field(default_factory=dict)
    took_s: dict[int, float] = field(default_factory=dict)
    measured: int = 0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> RankReport:
        assert isinstance(other, RankReport)
        return RankReport(
            _sum(self.ended, other.ended),
            _sum(self.failed, other.failed),
            _longest(self.took_s, other.took_s),
            max(self.measured, other.measured),
        )


def _sum(a: dict[int, int], b: dict[int, int]) -> dict[int, int]:
    return {job_id: a.get(job_id, 0) + b.get(job_id, 0) for job_id in a.keys() | b.keys()}


def _longest(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
    return {job_id: max(a.get(job_id, 0.0), b.get(job_id, 0.0)) for job_id in a.keys() | b.keys()}
