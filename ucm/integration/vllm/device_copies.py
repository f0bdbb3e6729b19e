"""Copies between an accelerator and the slots, on streams of their own.

    rank's thread                 lane of loads (thread + stream), lane of dumps likewise
    record an event, queue ──►    stream waits for the event; issue copies; record an event
    fence: stream waits   ◄──     the event, known as soon as everything is on the lane's stream
    finished              ◄──     the lane's thread has seen the event happen

A lane issues its submissions in order, on one stream, so the event of a later one covers the
earlier ones. Only the lanes' threads ever wait for the device.

How the bytes travel is decided once, in `device_routes`. Memory on the device: nothing where blocks
agree with pages, else one staging buffer per lane, and as much again while a gather runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ucm.errors import UcmError
from ucm.integration.vllm.arena import Arena
from ucm.integration.vllm.copies import (
    CLOSE_TIMEOUT_S,
    COPY_TIMEOUT_S,
    CopyEngine,
    Direction,
    JobLedger,
    PagePart,
)
from ucm.integration.vllm.device_routes import Route, plan_routes
from ucm.integration.vllm.device_transfers import Event, Transfers
from ucm.integration.vllm.views import LayerView
from ucm.store.page import PageGeometry, RankShare

logger = logging.getLogger(__name__)

_STAGING_BYTES = 64 << 20
# Below this a transfer's fixed cost, some microseconds, is more than its bytes take on the bus.
_DIRECT_RUN_BYTES = 64 << 10
# How often a lane looks whether its copies have ended, while there are any.
_POLL_S = 0.0005


class Accelerator:
    """The device, by torch's generic calls alone. The tests put main memory behind this door.

    Streams are current per thread: `record` and `wait` are about the calling thread's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def use_own_stream(self) -> None:
        """Gives the calling thread a stream that no other thread uses."""
        torch.accelerator.set_stream(torch.Stream(device=self.device))

    def record(self) -> Event:
        """A point after everything that the current stream holds now."""
        return torch.accelerator.current_stream(self.device).record_event()

    def wait(self, event: Event) -> None:
        """Later work on the current stream comes after `event`. The host doesn't wait."""
        assert isinstance(event, torch.Event)
        torch.accelerator.current_stream(self.device).wait_event(event)

    def upload(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """An index tensor, in the order of the current stream. From plain memory: the driver takes
        so few bytes along at once, where a pinned buffer might have to be allocated first."""
        return torch.tensor(ids, dtype=torch.int64).to(self.device, non_blocking=True)

    def pinned(self, nbytes: int) -> Tensor:
        """A host buffer that the device can copy from by itself, or failing that any."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            logger.warning("copies go through memory that is not pinned: %s", error)
            return torch.empty(nbytes, dtype=torch.uint8)


@dataclass(eq=False)
class _Submission:
    """One call of `submit` or `submit_layer`. `event` and `ok` are set before `queued`."""

    job_id: int
    layer: int | None
    parts: Sequence[PagePart]
    arena: Arena
    after: Event
    queued: threading.Event = field(default_factory=threading.Event)
    event: Event | None = None
    ok: bool = True


class DeviceCopyEngine(CopyEngine):
    """Copies for one accelerator. Smaller numbers than the defaults are for tests."""

    def __init__(
        self,
        views: Sequence[LayerView],
        *,
        geometry: PageGeometry,
        share: RankShare,
        accelerator: Accelerator | None = None,
        staging_bytes: int = _STAGING_BYTES,
        direct_run_bytes: int = _DIRECT_RUN_BYTES,
    ) -> None:
        super().__init__(len(views))
        device = views[0].parts[0].device
        self._accelerator = accelerator or Accelerator(device)
        self._after_forward: Event | None = None
        self._before_forward: Event | None = None
        # The last submission of each open job, and of each layer's loads by layer.
        self._open: dict[int, _Submission] = {}
        self._layer_loads: dict[int, _Submission] = {}
        routes = plan_routes(
            views,
            geometry=geometry,
            share=share,
            staging_bytes=staging_bytes,
            direct_run_bytes=direct_run_bytes,
        )
        self._lanes = {
            direction: _Lane(direction, routes, accelerator=self._accelerator, ledger=self._ledger)
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
            self._wait(submission)

    def fence(self, job_ids: Iterable[int]) -> None:
        for job_id in job_ids:
            if (submission := self._open.get(job_id)) is not None:
                self._wait(submission)

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
        submission = _Submission(job_id, layer, parts, arena, after or self._accelerator.record())
        self._open[job_id] = submission
        if is_load and layer is not None:
            self._layer_loads[layer] = submission
        self._lanes[direction].put(submission)

    def _wait(self, submission: _Submission) -> None:
        if not submission.queued.wait(COPY_TIMEOUT_S):
            raise UcmError(
                f"the copies of job {submission.job_id} were not started within "
                f"{COPY_TIMEOUT_S:.0f} s"
            )
        if submission.event is not None:
            self._accelerator.wait(submission.event)


class _Lane(threading.Thread):
    """One direction: a thread, a stream, a staging buffer."""

    def __init__(
        self,
        direction: Direction,
        routes: Sequence[Route],
        *,
        accelerator: Accelerator,
        ledger: JobLedger,
    ) -> None:
        super().__init__(name=f"ucm-{direction.value}", daemon=True)
        self._direction = direction
        self._routes = routes
        self._accelerator = accelerator
        self._ledger = ledger
        self._cond = threading.Condition()
        self._waiting: deque[_Submission] = deque()
        self._stopping = False
        # Only this thread's: submissions whose copies are on the stream, oldest first.
        self._running: deque[_Submission] = deque()
        self._transfers = Transfers(direction, accelerator)
        self._staging = torch.empty(
            max(route.staging_bytes for route in routes),
            dtype=torch.uint8,
            device=accelerator.device,
        )

    def put(self, submission: _Submission) -> None:
        with self._cond:
            self._waiting.append(submission)
            self._cond.notify()

    def stop(self) -> None:
        """Ends the thread when everything that was put has been copied."""
        with self._cond:
            self._stopping = True
            self._cond.notify()

    def run(self) -> None:
        self._accelerator.use_own_stream()
        # Inference mode is per thread, and a tensor made in it can only be written in it.
        with torch.inference_mode():
            while self._wait_for_work():
                if self._waiting:
                    self._issue(self._waiting.popleft())
                while self._running and self._has_ended(self._running[0]):
                    self._end(self._running.popleft())

    def _wait_for_work(self) -> bool:
        """False when there is none and never will be."""
        with self._cond:
            if not self._waiting and self._running:
                self._cond.wait(_POLL_S)
            while not self._waiting and not self._running:
                if self._stopping:
                    return False
                self._cond.wait()
        return True

    def _issue(self, submission: _Submission) -> None:
        try:
            self._accelerator.wait(submission.after)
            for route in self._routes:
                layers = route.layers
                if submission.layer is not None:
                    layers = range(submission.layer, submission.layer + 1)
                if layers.start in route.layers:
                    route.copy(
                        submission.parts, layers, submission.arena, self._transfers, self._staging
                    )
            submission.event = self._accelerator.record()
            submission.queued.set()
            self._transfers.settle()
        except Exception:
            logger.exception("job %d: a %s failed", submission.job_id, self._direction.value)
            submission.ok = False
            self._drain(submission)
        finally:
            submission.queued.set()
            self._running.append(submission)

    def _drain(self, submission: _Submission) -> None:
        """After a failure some copies may be on the stream: the job ends after them."""
        try:
            self._transfers.forget()
            submission.event = self._accelerator.record()
        except RuntimeError:
            submission.event = None  # the device itself has failed, and has said so above

    def _has_ended(self, submission: _Submission) -> bool:
        try:
            return submission.event is None or submission.event.query()
        except RuntimeError:
            logger.exception("job %d: a %s failed", submission.job_id, self._direction.value)
            submission.ok = False
            return True

    def _end(self, submission: _Submission) -> None:
        submission.arena.release()
        self._ledger.close_one(submission.job_id, ok=submission.ok)
