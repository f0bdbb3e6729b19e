"""A lane: the thread and the stream of one direction's copies.

Everything that is put into a lane ends, well or badly, whatever its thread meets: a job that nobody
ends would keep its request, its slots and its arena for ever. So the thread is guarded as a whole;
what it has in hand when something nobody thought of is raised fails, and it goes on.

An arena is given away only when no copy can touch it any more. Where the device can't say whether
that is so, because asking fails, the lane holds on for `HOLD_S` of failures: long after a graph's
capture has ended, during which asking is refused, and a device whose context is lost has stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ucm.errors import UcmError
from ucm.integration.copies.accelerator import Accelerator, DeviceEvent
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.copy_engine import check_blocks
from ucm.integration.copies.job_ledger import JobLedger
from ucm.integration.copies.jobs import Direction, PagePart, by_target
from ucm.integration.copies.ring import GivenUpError, Transfers
from ucm.integration.copies.routes import Route, RoutePages
from ucm.integration.copies.tails import TailBlanker

logger = logging.getLogger(__name__)

# How often a lane looks whether its copies have ended, while there are any, and while it fails.
_POLL_S = 0.0005
_FAILING_POLL_S = 0.05
HOLD_S = 5.0


@dataclass(eq=False)
class Submission:
    """One call of `submit` or `submit_layer`. `event` is set before `queued`: everything that will
    ever be copied is on the stream, and the event comes after it. `kept` lives until then."""

    job_id: int
    layer: int | None
    parts: Sequence[PagePart]
    arena: Arena
    after: DeviceEvent
    queued: threading.Event = field(default_factory=threading.Event)
    event: DeviceEvent | None = None
    ok: bool = True
    kept: object = None


@dataclass(frozen=True)
class LaneTarget:
    """The ways of one target's layers. Lanes of both directions use it."""

    routes: Sequence[Route]
    tails: TailBlanker

    @property
    def num_blocks(self) -> int:
        return min(route.num_blocks for route in self.routes)

    @property
    def staging_bytes(self) -> int:
        return max(route.staging_bytes for route in self.routes)


class Lane(threading.Thread):
    """One direction: a thread, a stream, a staging buffer that is large enough for any target."""

    def __init__(
        self,
        direction: Direction,
        targets: Sequence[LaneTarget],
        *,
        accelerator: Accelerator,
        ledger: JobLedger,
        hold_s: float,
    ) -> None:
        super().__init__(name=f"ucm-{direction.value}", daemon=True)
        self._direction = direction
        self._targets = targets
        self._accelerator = accelerator
        self._ledger = ledger
        self._hold_s = hold_s
        self._cond = threading.Condition()
        self._waiting: deque[Submission] = deque()
        self._stopping = False
        # The rest is only this thread's. Submissions whose copies are on the stream, oldest first.
        self._running: deque[Submission] = deque()
        self._failing_since_s: float | None = None
        self._has_stream = False
        self._transfers = Transfers(direction, accelerator)
        self._staging = accelerator.empty(max(target.staging_bytes for target in targets))

    def put(self, submission: Submission) -> None:
        with self._cond:
            if not self.is_alive():
                raise UcmError(f"{self.name}: its thread has ended")
            self._waiting.append(submission)
            self._cond.notify()

    def stop(self) -> None:
        """Ends the thread when everything that was put has been copied."""
        with self._cond:
            self._stopping = True
            self._cond.notify()

    def run(self) -> None:
        # Inference mode is per thread, and a tensor made in it can only be written in it.
        with torch.inference_mode():
            while not self._serve():
                pass

    def _serve(self) -> bool:
        """False: something was raised that no submission has caught."""
        try:
            while self._wait_for_work():
                self._work()
        except Exception:
            logger.exception("%s: the jobs that it has in hand fail, and it goes on", self.name)
            self._fail_all()
            return False
        return True

    def _work(self) -> None:
        if not self._has_stream:
            self._accelerator.use_own_stream()
            self._has_stream = True
        if self._waiting:
            self._issue(self._waiting.popleft())
        while self._running and self._has_ended(self._running[0]):
            self._end(self._running.popleft())

    def _wait_for_work(self) -> bool:
        """False when there is none and never will be."""
        with self._cond:
            if not self._waiting and self._running:
                self._cond.wait(_POLL_S if self._failing_since_s is None else _FAILING_POLL_S)
            while not self._waiting and not self._running:
                if self._stopping:
                    return False
                self._cond.wait()
        return True

    def _issue(self, submission: Submission) -> None:
        try:
            self._copy(submission)
            submission.event = self._accelerator.record()
        except GivenUpError:
            submission.ok = False
            self._drain(submission)
        except Exception:
            logger.exception("job %d: a %s failed", submission.job_id, self._direction.value)
            submission.ok = False
            self._drain(submission)
        finally:
            submission.kept = self._transfers.kept
            self._running.append(submission)
            submission.queued.set()

    def _copy(self, submission: Submission) -> None:
        job_id = submission.job_id
        self._transfers.begin(lambda: self._ledger.is_failing(job_id))
        parts_of = by_target(submission.parts)
        for at, parts in parts_of.items():
            num_blocks = self._targets[at].num_blocks
            for part in parts:
                check_blocks(part, num_blocks=num_blocks)
        ids = self._upload(parts_of)
        self._accelerator.wait(submission.after)
        for at, parts in parts_of.items():
            pages = RoutePages(parts, submission.arena, ids.get(at))
            for route in self._targets[at].routes:
                layers = route.layers
                if submission.layer is not None:
                    layers = range(submission.layer, submission.layer + 1)
                if layers.start in route.layers:
                    route.copy(pages, layers, self._transfers, self._staging)

    def _upload(self, parts_of: Mapping[int, Sequence[PagePart]]) -> dict[int, Tensor]:
        """The block ids of each target that stages, in one upload. Before the stream waits for
        anything: a driver that lets the host wait for an upload must not let it wait for the
        forward pass."""
        ids = {
            at: [block_id for part in parts for block_id in part.block_ids]
            for at, parts in parts_of.items()
            if self._targets[at].staging_bytes
        }
        flat = np.array([block_id for some in ids.values() for block_id in some], dtype=np.int64)
        if not flat.size:
            return {}
        pieces = torch.split(self._accelerator.upload(flat), [len(some) for some in ids.values()])
        return dict(zip(ids, pieces, strict=True))

    def _drain(self, submission: Submission) -> None:
        """After a failure some copies may be on the stream: the job ends after them."""
        try:
            submission.event = self._accelerator.record()
        except RuntimeError:
            submission.event = None  # the device itself has failed, and has said so above
        self._transfers.forget(submission.event)

    def _has_ended(self, submission: Submission) -> bool:
        """What has gone by the ring is in the slots, too."""
        try:
            if submission.event is None:
                raise UcmError("the device has not said when its copies end")
            if not submission.event.query():
                return False
            self._transfers.settle()
        except Exception as error:  # noqa: BLE001 - it is logged, at most once in a row
            return self._has_failed_for_long(submission, error)
        self._failing_since_s = None
        return True

    def _has_failed_for_long(self, submission: Submission, error: Exception) -> bool:
        """A single failure says nothing about the copies."""
        now_s = time.monotonic()
        if self._failing_since_s is None:
            self._failing_since_s = now_s
            logger.error(
                "job %d: the device does not say whether a %s has ended (%s); asked again for "
                "%.0f s",
                submission.job_id,
                self._direction.value,
                error,
                self._hold_s,
            )
        if now_s - self._failing_since_s < self._hold_s:
            return False
        submission.ok = False
        return True

    def _end(self, submission: Submission) -> None:
        try:
            if self._direction is Direction.DUMP and submission.ok:
                self._blank_tails(submission)
            submission.arena.release()
        finally:
            self._ledger.close_one(submission.job_id, submission.layer, ok=submission.ok)

    def _blank_tails(self, submission: Submission) -> None:
        """All that the device, or the ring, brings to the slots is there."""
        try:
            for at, parts in by_target(submission.parts).items():
                self._targets[at].tails.blank(parts, submission.arena, submission.layer)
        except Exception:
            logger.exception("job %d: what is behind a tail can't be blanked", submission.job_id)
            submission.ok = False

    def _fail_all(self) -> None:
        """What runs ends after its copies, as failed; what waits ends now."""
        for submission in self._running:
            submission.ok = False
        while self._waiting:
            submission = self._waiting.popleft()
            submission.ok = False
            submission.queued.set()
            self._end(submission)
