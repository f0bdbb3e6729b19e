"""Copies between an accelerator and the slots, on streams of their own.

    rank's thread                 lane of loads (thread + stream), lane of dumps likewise
    record an event, queue ──►    upload block ids; stream waits for the event; issue copies; record
    fence: stream waits   ◄──     the event, known as soon as everything is on the lane's stream
    finished              ◄──     the lane's thread has seen the event happen, and blanked tails

A lane (`device_lanes`) issues its submissions in order, on one stream, so the event of a later one
covers the earlier ones. Only the lanes' threads ever wait for the device.

A fence waits on the host only until the copies are on the lane's stream, and not for long: a dump
that isn't there then, because the ring in front of it waits for the forward pass, is given up. That
costs a hit; the wait would cost every request of the engine a forward pass.

How the bytes travel is decided once, in `device_routes`. Memory on the device: nothing where blocks
agree with pages, else one staging buffer per lane.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ucm.integration.copies.accelerator import Accelerator, BatchedCopy, DeviceEvent
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.copy_engine import CLOSE_TIMEOUT_S, COPY_TIMEOUT_S, CopyEngine
from ucm.integration.copies.jobs import Direction, PagePart
from ucm.integration.copies.lane import HOLD_S, Lane, LaneTarget, Submission
from ucm.integration.copies.routes import plan_routes
from ucm.integration.copies.tails import TailBlanker
from ucm.integration.copies.target import CopyTarget

logger = logging.getLogger(__name__)

STAGING_BYTES = 16 << 20
# Below this a transfer's fixed cost, some microseconds, is more than its bytes take on the bus.
DIRECT_RUN_BYTES = 64 << 10
# Putting the copies of a whole prompt on a stream takes a lane a few ms.
FENCE_GRACE_S = 0.2


@dataclass(frozen=True, kw_only=True)
class CopyLimits:
    """Smaller numbers than these are for tests. Runs of `direct_run_bytes` and more go straight
    between device and slots, others by `staging_bytes` of device memory. A fence gives a dump that
    is not under way `fence_grace_s`; a lane whose device can't be asked holds on for `hold_s`."""

    staging_bytes: int = STAGING_BYTES
    direct_run_bytes: int = DIRECT_RUN_BYTES
    fence_grace_s: float = FENCE_GRACE_S
    hold_s: float = HOLD_S


DEFAULT_LIMITS = CopyLimits()


class DeviceCopyEngine(CopyEngine):
    """Copies for one accelerator."""

    def __init__(
        self,
        targets: Sequence[CopyTarget],
        *,
        accelerator: Accelerator | None = None,
        batched: BatchedCopy | None = None,
        limits: CopyLimits = DEFAULT_LIMITS,
    ) -> None:
        super().__init__(targets)
        device = targets[0].views[0].parts[0].device
        self._accelerator = accelerator or Accelerator(device, batched=batched)
        self._fence_grace_s = limits.fence_grace_s
        self._after_forward: DeviceEvent | None = None
        self._before_forward: DeviceEvent | None = None
        # The last submission of each open job, and of each layer's loads by layer.
        self._open: dict[int, Submission] = {}
        self._layer_loads: dict[int, Submission] = {}
        of_lanes = [
            LaneTarget(
                plan_routes(
                    target,
                    staging_bytes=limits.staging_bytes,
                    direct_run_bytes=limits.direct_run_bytes,
                ),
                TailBlanker(target.geometry, target.share),
            )
            for target in targets
        ]
        self._lanes = {
            direction: Lane(
                direction,
                of_lanes,
                accelerator=self._accelerator,
                ledger=self._ledger,
                hold_s=limits.hold_s,
            )
            for direction in Direction
        }
        for lane in self._lanes.values():
            lane.start()

    def order_after_forward(self) -> None:
        self._after_forward = self._accelerator.record()

    def order_before_forward(self) -> None:
        self._before_forward = self._accelerator.record()

    def wait_layer(self, layer: int) -> None:
        submission = self._layer_loads.pop(layer, None)
        if submission is not None:
            self._wait(submission, COPY_TIMEOUT_S)

    def fence(self, job_ids: Iterable[int]) -> None:
        deadline_s = time.monotonic() + self._fence_grace_s
        for job_id in job_ids:
            if (submission := self._open.get(job_id)) is not None:
                self._wait(submission, deadline_s - time.monotonic())

    def wait_until_queued(self) -> None:
        deadline_s = time.monotonic() + COPY_TIMEOUT_S
        for submission in list(self._open.values()):
            submission.queued.wait(max(0.0, deadline_s - time.monotonic()))

    def finished(self) -> list[int]:
        ended = super().finished()
        for job_id in ended:
            self._open.pop(job_id, None)
        return ended

    def close(self) -> None:
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for lane in self._lanes.values():
            lane.stop()
        for lane in self._lanes.values():
            lane.join(max(0.0, deadline - time.monotonic()))
            if lane.is_alive():
                logger.error("%s: copies have not ended in %.0f s", lane.name, CLOSE_TIMEOUT_S)

    def _enqueue(
        self,
        job_id: int,
        direction: Direction,
        layer: int | None,
        parts: Sequence[PagePart],
        arena: Arena,
    ) -> None:
        is_load = direction is Direction.LOAD
        after = self._before_forward if is_load else self._after_forward
        submission = Submission(job_id, layer, parts, arena, after or self._accelerator.record())
        self._lanes[direction].put(submission)
        self._open[job_id] = submission
        if is_load and layer is not None:
            self._layer_loads[layer] = submission

    def _wait(self, submission: Submission, timeout_s: float) -> None:
        """The current stream, for the copies. If they are not on their stream in time the job fails
        instead: what it reads may be overwritten, and what it should have written isn't there."""
        if not submission.queued.wait(max(0.0, timeout_s)):
            self._ledger.fail([submission.job_id])
            logger.warning("job %d is given up: its copies could not start", submission.job_id)
        elif submission.event is not None:
            self._accelerator.wait(submission.event)
