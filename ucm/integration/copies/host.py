"""Copies on a machine whose KV lies in main memory: a few threads and plain strided copies.

A task is some pages of one submission. A thread builds the pairs of views of a whole task and hands
them to torch in one call, because every call that returns to Python waits for the interpreter lock,
up to 5 ms each while the forward pass runs Python. Torch copies such a list one by one, without the
lock and, with one OpenMP thread per copying thread, without OpenMP's barriers: those wait for
threads that have lost their core to the forward pass or to another process.

Figures: 113 MB as 27 pages of 16 layers, 4 heads, 128 tokens, 128 + 128 bfloat16, K transposed in
the block, on two cores. Best and worst of 11 interleaved runs in ms, other processes now and then:

                                              load          dump
    one list in strips, 2 threads             12 -  27      10 -  22
    the same without strips                   13 -  32      10 -  29
    one list in strips, 1 thread              21 -  28      17 -  20
    copy_ per block, 2 OpenMP threads         13 - 437      10 - 432
    copy_ per block in strips, likewise       12 - 382      10 -  53
    copy_ per block and layer, likewise       17 -  63      13 -  33
    K as int32 pairs, then split apart        12 -  24
    numpy, 1 thread                           22 -  33      18 -  20
    one indexed copy of all blocks            22 -  56      52 - 100

CPU ms of a load by one thread, on another machine: straight from the page 23, in strips of 64
tokens 19.5, by way of memory where tokens lie side by side (this file) 16.5.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ucm.errors import UcmError
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.copy_engine import (
    CLOSE_TIMEOUT_S,
    COPY_TIMEOUT_S,
    CopyEngine,
    check_blocks,
    first_units,
)
from ucm.integration.copies.jobs import Direction, PagePart, by_target
from ucm.integration.copies.placement import PlacedPart, placed_parts
from ucm.integration.copies.tails import TailBlanker
from ucm.integration.copies.target import CopyTarget

logger = logging.getLogger(__name__)

# One copying thread moves 5 GB/s transposed and 18 plain; more than a few only take cores from the
# forward pass.
_MAX_THREADS = 4
# About 10 ms of one thread: the longest that a dump holds up a load.
_TASK_BYTES = 64 << 20
# A transposed load reads one cache line per token again and again, and lines of a page lie far
# apart. So it goes by way of a piece of memory where they lie side by side, which stays in the
# second-level cache: a fifth faster than straight from the page, in strips of 64 tokens.
_BESIDE_BYTES = 512 << 10


@dataclass(eq=False)
class _HostJob:
    """One call of `submit` or `submit_layer`. `tasks_left` and `ok` are guarded by the engine."""

    job_id: int
    direction: Direction
    layer: int | None
    arena: Arena
    tasks_left: int
    ok: bool = True


@dataclass(frozen=True)
class _HostTask:
    submission: _HostJob
    parts: Sequence[PagePart]


class _PlacedTarget:
    """Which parts of a target are copied with all of its layers (None), or with one."""

    def __init__(self, target: CopyTarget) -> None:
        self.tails = TailBlanker(target.geometry, target.share)
        self._geometry = target.geometry
        self._block_units = target.block_units
        placed = placed_parts(target)
        self._num_blocks = min(p.tensor.shape[1] for p in placed)
        self._placed: dict[int | None, tuple[PlacedPart, ...]] = {None: placed}
        for layer in range(len(target.views)):
            self._placed[layer] = tuple(
                p.within(range(layer, layer + 1)) for p in placed if layer in p.layers
            )

    def add_views(
        self,
        parts: Sequence[PagePart],
        arena: Arena,
        layer: int | None,
        *,
        device: list[Tensor],
        slots: list[Tensor],
    ) -> None:
        """Pairs of the same elements, in the blocks and in the pages. Page by page, K next to V: a
        tenth faster than all K and then all V."""
        placed = self._placed[layer]
        memories = [arena.typed(p.tensor.dtype) for p in placed]
        for part in parts:
            check_blocks(part, num_blocks=self._num_blocks)
            units = first_units(part, geometry=self._geometry, block_units=self._block_units)
            for block_id, unit in zip(part.block_ids, units, strict=True):
                for p, memory in zip(placed, memories, strict=True):
                    device.append(p.tensor.select(1, block_id))
                    slots.append(p.in_slot(memory, slot_offset=part.slot_offset, first_unit=unit))


class HostCopyEngine(CopyEngine):
    """`num_threads` copying threads: by default one per CPU, at most four."""

    def __init__(self, targets: Sequence[CopyTarget], *, num_threads: int | None = None) -> None:
        super().__init__(targets)
        self._targets = [_PlacedTarget(target) for target in targets]
        share_bytes = max(target.share_bytes for target in targets)
        self._task_pages = max(1, _TASK_BYTES // share_bytes)

        # Guards the queues, the submissions' counts and `_layer_loads`.
        self._cond = threading.Condition()
        self._queues: dict[Direction, deque[_HostTask]] = {d: deque() for d in Direction}
        self._layer_loads: dict[int, set[_HostJob]] = defaultdict(set)
        self._closing = False
        cpus = _allowed_cpus()
        num_threads = num_threads or max(1, min(_MAX_THREADS, len(cpus)))
        self._threads = [
            threading.Thread(target=self._run, args=(cpus,), name=f"ucm-copy-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    # -- the rank's thread -----------------------------------------------------------------

    def order_after_forward(self) -> None:
        """Nothing to order: the forward pass has computed what it has returned from."""

    def order_before_forward(self) -> None:
        """Nothing to order."""

    def wait_layer(self, layer: int) -> None:
        with self._cond:
            loads = self._layer_loads[layer]
            if not self._cond.wait_for(lambda: not loads, COPY_TIMEOUT_S):
                self._give_up({submission.job_id for submission in loads})

    def fence(self, job_ids: Iterable[int]) -> None:
        if late := self._ledger.wait(job_ids, timeout_s=COPY_TIMEOUT_S):
            self._give_up(late)

    def wait_until_queued(self) -> None:
        self._ledger.wait_for_all(timeout_s=COPY_TIMEOUT_S)

    def _give_up(self, job_ids: Collection[int]) -> None:
        logger.error("jobs %s fail: not copied within %.0f s", sorted(job_ids), COPY_TIMEOUT_S)
        self._ledger.fail(job_ids)

    def close(self) -> None:
        with self._cond:
            self._closing = True
            self._cond.notify_all()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            logger.error("copies have not ended within %.0f s of closing", CLOSE_TIMEOUT_S)

    def _enqueue(
        self,
        job_id: int,
        direction: Direction,
        layer: int | None,
        parts: Sequence[PagePart],
        arena: Arena,
    ) -> None:
        # Two tasks per thread: one that is slowed down by the forward pass then leaves its second
        # to the others.
        wanted = -(-len(parts) // (2 * len(self._threads)))
        size = max(1, min(wanted, self._task_pages))
        chunks = [parts[i : i + size] for i in range(0, len(parts), size)] or [()]
        submission = _HostJob(job_id, direction, layer, arena, len(chunks))
        with self._cond:
            if self._closing:
                raise UcmError("the copying threads have ended")
            if direction is Direction.LOAD and layer is not None:
                self._layer_loads[layer].add(submission)
            self._queues[direction].extend(_HostTask(submission, chunk) for chunk in chunks)
            self._cond.notify_all()

    # -- the copying threads ---------------------------------------------------------------

    def _run(self, cpus: set[int]) -> None:
        _use_cpus(cpus)
        _use_one_openmp_thread()
        # Inference mode is per thread, and a tensor made in it can only be written in it.
        with torch.inference_mode():
            while (task := self._next()) is not None:
                self._do(task)

    def _do(self, task: _HostTask) -> None:
        try:
            self._task_ended(task.submission, ok=self._attempt(task))
        except Exception:
            # A thread that ends would take a share of all later jobs with it, unseen.
            logger.exception("job %d: its end failed", task.submission.job_id)

    def _next(self) -> _HostTask | None:
        """The next task, loads first; None when closing and nothing is left."""
        with self._cond:
            while True:
                for direction in (Direction.LOAD, Direction.DUMP):
                    if self._queues[direction]:
                        return self._queues[direction].popleft()
                if self._closing:
                    return None
                self._cond.wait()

    def _task_ended(self, submission: _HostJob, *, ok: bool) -> None:
        with self._cond:
            submission.ok = submission.ok and ok
            submission.tasks_left -= 1
            if submission.tasks_left:
                return
            if submission.direction is Direction.LOAD and submission.layer is not None:
                self._layer_loads[submission.layer].discard(submission)
                self._cond.notify_all()
        try:
            submission.arena.release()
        finally:
            self._ledger.close_one(submission.job_id, submission.layer, ok=submission.ok)

    def _attempt(self, task: _HostTask) -> bool:
        try:
            if self._ledger.is_failing(task.submission.job_id):
                return False  # its blocks may be others' by now
            self._copy(task)
        except Exception:
            logger.exception("job %d: a copy failed", task.submission.job_id)
            return False
        return True

    def _copy(self, task: _HostTask) -> None:
        arena, layer = task.submission.arena, task.submission.layer
        parts_of = by_target(task.parts)
        device: list[Tensor] = []
        slots: list[Tensor] = []
        for at, parts in parts_of.items():
            self._targets[at].add_views(parts, arena, layer, device=device, slots=slots)
        if task.submission.direction is Direction.DUMP:
            _copy_all(into=slots, out_of=device)
            for at, parts in parts_of.items():
                self._targets[at].tails.blank(parts, arena, layer)
        else:
            into, out_of = _side_by_side(device, slots)
            _copy_all(into=into, out_of=out_of)


def _side_by_side(device: list[Tensor], slots: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What to copy into and out of, in this order, to load [layer, head, unit, size] each: where
    the device's is transposed, piece by piece through one memory for all pieces."""
    into: list[Tensor] = []
    out_of: list[Tensor] = []
    beside: dict[torch.dtype, Tensor] = {}
    for target, source in zip(device, slots, strict=True):
        if not target.stride(2) == 1 != target.stride(3):
            into.append(target)
            out_of.append(source)
            continue
        memory = beside.get(source.dtype)
        if memory is None or memory.numel() < _piece_items(source):
            memory = beside[source.dtype] = torch.empty(_piece_items(source), dtype=source.dtype)
        for piece, its_source in zip(_pieces(target), _pieces(source), strict=True):
            between = memory[: piece.numel()].view(piece.shape)
            into += [between, piece]
            out_of += [its_source, between]
    return into, out_of


def _pieces(tensor: Tensor) -> list[Tensor]:
    """[layer, head, unit, size] cut along its layers, or its heads too."""
    layers, heads = _piece_shape(tensor)
    return [
        tensor[layer : layer + layers, head : head + heads]
        for layer in range(0, tensor.shape[0], layers)
        for head in range(0, tensor.shape[1], heads)
    ]


def _piece_items(tensor: Tensor) -> int:
    layers, heads = _piece_shape(tensor)
    return layers * heads * tensor.shape[2] * tensor.shape[3]


def _piece_shape(tensor: Tensor) -> tuple[int, int]:
    """How many layers, and how many heads of each."""
    num_layers, num_heads, units, size = tensor.shape
    heads_at_once = max(1, _BESIDE_BYTES // max(1, units * size * tensor.element_size()))
    return min(num_layers, max(1, heads_at_once // num_heads)), min(num_heads, heads_at_once)


def _copy_all(*, into: list[Tensor], out_of: list[Tensor]) -> None:
    if into:
        torch._foreach_copy_(into, out_of)


def _allowed_cpus() -> set[int]:
    """The CPUs that this process was started with.

    vLLM binds the threads of a CPU engine one to a core each, through OpenMP's environment. That
    binds the main thread at import, and every thread it starts later inherits its one core. The
    parent process has not been bound.
    """
    try:
        return os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid())
    except (AttributeError, OSError):
        return set(range(os.cpu_count() or 1))


def _use_cpus(cpus: set[int]) -> None:
    try:
        os.sched_setaffinity(0, cpus)
    except (AttributeError, OSError) as error:
        logger.info("copying threads stay on the CPUs of the thread that started them: %s", error)


def _use_one_openmp_thread() -> None:
    """For this thread alone. torch.set_num_threads would also set what later threads start with,
    and vLLM's CPU worker replaces it by one that does nothing."""
    torch.get_num_threads()  # torch sets up a thread's OpenMP at first use, and would undo ours
    try:
        ctypes.CDLL(None).omp_set_num_threads(1)
    except (AttributeError, OSError) as error:
        logger.info("copying threads use OpenMP as they find it: %s", error)
