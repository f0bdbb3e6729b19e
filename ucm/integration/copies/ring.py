"""Runs of bytes between an accelerator and the slots, straight or by a pinned ring."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ucm.errors import UcmError
from ucm.integration.copies.accelerator import Accelerator, DeviceEvent
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.jobs import Direction

logger = logging.getLogger(__name__)

Offsets = npt.NDArray[np.int64]

# A small copy of the engine's own waits for the transfer before it: this long ones take 0.1 ms.
_MAX_TRANSFER_BYTES = 4 << 20
# Transfers that are handed over in one call.
_MAX_TRANSFERS = 512
# Of the batched call, in a row, until it isn't tried any more.
_MAX_FAILURES = 3
_RING_BUFFERS = 4
_RING_BUFFER_BYTES = 8 << 20
_POLL_S = 0.0002


class GivenUpError(UcmError):
    """Nobody wants the rest of a submission any more."""


@dataclass(eq=False)
class _RingBuffer:
    """A pinned buffer with the runs of one submission, `used` bytes of them. Busy until `event`;
    then a dump's are still to be copied from it to their slots."""

    memory: Tensor
    used: int = 0
    event: DeviceEvent | None = None
    targets: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class _Batch:
    """Transfers that wait for `flush`: between `flat`, bytes on the device, and the slots."""

    flat: Tensor
    arena: Arena
    starts: Offsets
    slots: Offsets
    sizes: Offsets


class Transfers:
    """Runs of bytes between the device and an arena, on the current stream. One per lane.

    What is pinned goes straight, many transfers per call, their addresses made by numpy: where the
    engine has a batched copy that is a single call into the driver. The rest goes by a pinned ring.
    What went by the ring is in the slots when `settle` has been called after its event.
    """

    def __init__(
        self,
        direction: Direction,
        device: Accelerator,
        *,
        max_transfer_bytes: int = _MAX_TRANSFER_BYTES,
    ) -> None:
        self.direction = direction
        self.device = device
        self._max_bytes = max_transfer_bytes
        self._batches: list[_Batch] = []
        self._failures = 0
        self._ring: deque[_RingBuffer] = deque()
        # Of the submission that is being issued.
        self._mine: list[_RingBuffer] = []
        self._given_up: Callable[[], bool] = lambda: False
        # What the driver may still read: to be kept until the submission's event.
        self.kept: list[tuple[Tensor, ...]] = []

    def begin(self, given_up: Callable[[], bool]) -> None:
        """Another submission. While it waits for a ring buffer it asks whether it is wanted."""
        self._mine = []
        self.kept = []
        self._given_up = given_up

    def add(self, flat: Tensor, starts: Offsets, arena: Arena, slots: Offsets, nbytes: int) -> None:
        """Runs of `nbytes`: from `starts` in `flat`, which is bytes on the device, to or from
        `slots` in the arena. Issued by `flush`."""
        starts, slots, sizes = _cut(starts, slots, nbytes, self._max_bytes)
        pinned = arena.whole(slots, sizes)
        if pinned.all():
            self._batches.append(_Batch(flat, arena, starts, slots, sizes))
            return
        self._batches.append(_Batch(flat, arena, starts[pinned], slots[pinned], sizes[pinned]))
        for start, slot, size in zip(
            starts[~pinned].tolist(), slots[~pinned].tolist(), sizes[~pinned].tolist(), strict=True
        ):
            self._add_in_pieces(flat, start, arena, slot, size)

    def _add_in_pieces(self, flat: Tensor, start: int, arena: Arena, slot: int, size: int) -> None:
        for piece in arena.pieces(slot, size):
            at = start + piece.start - slot
            if piece.pinned:
                one = (np.array([n], dtype=np.int64) for n in (at, piece.start, piece.nbytes))
                self._batches.append(_Batch(flat, arena, *one))
            else:
                self._by_ring(flat[at : at + piece.nbytes], arena.bytes[piece.start : piece.end])

    def flush(self) -> None:
        """Puts all that was added on the stream."""
        batches, self._batches = self._batches, []
        batches = [batch for batch in batches if batch.starts.size]
        if not batches:
            return
        if self._given_up():
            raise GivenUpError("nobody waits for these copies any more")
        if self.device.batched is not None:
            try:
                self._flush_batched(batches)
                self._failures = 0
                return
            except (RuntimeError, NotImplementedError) as error:
                self._batched_failed(error)
        self._flush_one_by_one(batches)

    def _batched_failed(self, error: Exception) -> None:
        """Once may be the moment's fault; several times in a row it is the driver's."""
        self._failures += 1
        if self._failures == _MAX_FAILURES:
            self.device.batched = None
            logger.warning("the engine's batched copy fails, copies go one by one: %s", error)

    def _flush_batched(self, batches: list[_Batch]) -> None:
        assert self.device.batched is not None
        on_device = np.concatenate([b.flat.data_ptr() + b.starts for b in batches])
        in_slots = np.concatenate([b.arena.bytes.data_ptr() + b.slots for b in batches])
        sizes = np.concatenate([b.sizes for b in batches])
        is_load = self.direction is Direction.LOAD
        sources, targets = (in_slots, on_device) if is_load else (on_device, in_slots)
        lists = tuple(torch.from_numpy(each) for each in (sources, targets, sizes))
        self.kept.append(lists)
        self.device.batched(*lists)

    def _flush_one_by_one(self, batches: list[_Batch]) -> None:
        on_device: list[Tensor] = []
        in_slots: list[Tensor] = []
        for batch in batches:
            for start, slot, size in zip(
                batch.starts.tolist(), batch.slots.tolist(), batch.sizes.tolist(), strict=True
            ):
                on_device.append(batch.flat[start : start + size])
                in_slots.append(batch.arena.bytes[slot : slot + size])
        is_load = self.direction is Direction.LOAD
        into, out_of = (on_device, in_slots) if is_load else (in_slots, on_device)
        for first in range(0, len(into), _MAX_TRANSFERS):
            some = slice(first, first + _MAX_TRANSFERS)
            self.device.copy(into[some], out_of[some])

    def settle(self) -> None:
        """Puts into the slots what has arrived in the ring; waits for nothing."""
        for buffer in self._ring:
            if buffer.event is not None and buffer.event.query():
                self._free(buffer)

    def forget(self, event: DeviceEvent | None) -> None:
        """Drops what the submission in hand has left, after it failed. Its buffers are in use until
        `event`; None: the device can't say, they are not used again."""
        self._batches = []
        for buffer in self._mine:
            buffer.event, buffer.targets = event, []
            if event is None:
                self._ring.remove(buffer)
        self._mine = []

    def _by_ring(self, run: Tensor, slot: Tensor) -> None:
        done = 0
        while done < run.numel():
            buffer = self._buffer_with_room()
            nbytes = min(run.numel() - done, buffer.memory.numel() - buffer.used)
            memory = buffer.memory[buffer.used : buffer.used + nbytes]
            on_device, in_slot = run[done : done + nbytes], slot[done : done + nbytes]
            buffer.used += nbytes
            done += nbytes
            if self.direction is Direction.LOAD:
                memory.copy_(in_slot)
                self.device.copy([on_device], [memory])
            else:
                self.device.copy([memory], [on_device])
                buffer.targets.append((in_slot, memory))
            buffer.event = self.device.record()

    def _buffer_with_room(self) -> _RingBuffer:
        if self._mine and self._mine[-1].used < self._mine[-1].memory.numel():
            return self._mine[-1]
        return self._next_buffer()

    def _next_buffer(self) -> _RingBuffer:
        if len(self._ring) < _RING_BUFFERS:
            self._ring.append(_RingBuffer(self.device.pinned(_RING_BUFFER_BYTES)))
        else:
            self._ring.rotate(-1)
            self._wait_for(self._ring[-1])
        buffer = self._ring[-1]
        if buffer in self._mine:
            self._mine.remove(buffer)
        self._mine.append(buffer)
        return buffer

    def _wait_for(self, buffer: _RingBuffer) -> None:
        """For its copy, which may be behind a whole forward pass."""
        event = buffer.event
        while event is not None and not event.query():
            if self._given_up():
                raise GivenUpError("nobody waits for these copies any more")
            time.sleep(_POLL_S)
        self._free(buffer)

    def _free(self, buffer: _RingBuffer) -> None:
        for in_slot, memory in buffer.targets:
            in_slot.copy_(memory)
        buffer.used, buffer.event, buffer.targets = 0, None, []


def _cut(starts: Offsets, slots: Offsets, nbytes: int, max_bytes: int) -> tuple[Offsets, ...]:
    """The same bytes as runs of at most `max_bytes`: starts, slots, sizes."""
    offsets = np.arange(0, nbytes, max_bytes, dtype=np.int64)
    sizes = np.minimum(max_bytes, nbytes - offsets)
    if offsets.size == 1:
        return starts, slots, np.full(starts.shape, nbytes, dtype=np.int64)
    return (
        (starts[:, None] + offsets).reshape(-1),
        (slots[:, None] + offsets).reshape(-1),
        np.tile(sizes, starts.size),
    )
