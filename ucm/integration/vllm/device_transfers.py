"""Runs of bytes between an accelerator and the slots, straight or by a pinned ring."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ucm.integration.vllm.arena import Arena
from ucm.integration.vllm.copies import Direction

_RING_BUFFERS = 4
_RING_BUFFER_BYTES = 8 << 20
# Transfers that are handed to torch in one call.
_MAX_TRANSFERS = 512


class Event(Protocol):
    """A point in the work of a stream: torch.Event, as far as copies need it."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class Device(Protocol):
    """What routes need of an `Accelerator`."""

    def record(self) -> Event: ...
    def upload(self, ids: Sequence[Sequence[int]]) -> Tensor: ...
    def pinned(self, nbytes: int) -> Tensor: ...


@dataclass
class _RingBuffer:
    """A pinned buffer; busy until `event`, then (a dump's) still to be copied to `target`."""

    memory: Tensor
    event: Event | None = None
    target: Tensor | None = None


class Transfers:
    """Runs of bytes between the device and an arena, on the current stream. One per lane.

    What is pinned goes straight, many transfers per call: torch then issues them without coming
    back to Python, where each could wait for the interpreter lock. The rest goes by a pinned ring.
    """

    def __init__(self, direction: Direction, device: Device) -> None:
        self.direction = direction
        self.device = device
        self._on_device: list[Tensor] = []
        self._in_slots: list[Tensor] = []
        self._ring: deque[_RingBuffer] = deque()

    def add(self, run: Tensor, arena: Arena, start: int) -> None:
        """`run`, flat bytes on the device, to or from `arena` at `start`; issued by `flush`."""
        for piece in arena.pieces(start, run.numel()):
            part = run[piece.start - start : piece.end - start]
            slot = arena.bytes[piece.start : piece.end]
            if piece.pinned:
                self._on_device.append(part)
                self._in_slots.append(slot)
            else:
                self._by_ring(part, slot)
        if len(self._on_device) >= _MAX_TRANSFERS:
            self.flush()

    def flush(self) -> None:
        """Puts all that was added on the stream."""
        into, out_of = self._on_device, self._in_slots
        self._on_device, self._in_slots = [], []
        if self.direction is Direction.DUMP:
            into, out_of = out_of, into
        if into:
            torch._foreach_copy_(into, out_of, non_blocking=True)

    def settle(self) -> None:
        """Waits until what went by the ring has reached the slots."""
        for buffer in self._ring:
            self._free(buffer)

    def forget(self) -> None:
        """Drops what a failed submission has left. Its ring may still be in use: a new one then."""
        self._on_device, self._in_slots = [], []
        self._ring.clear()

    def _by_ring(self, run: Tensor, slot: Tensor) -> None:
        for start in range(0, run.numel(), _RING_BUFFER_BYTES):
            part = slice(start, start + _RING_BUFFER_BYTES)
            buffer = self._next_buffer()
            memory = buffer.memory[: run[part].numel()]
            if self.direction is Direction.LOAD:
                memory.copy_(slot[part])
                run[part].copy_(memory, non_blocking=True)
            else:
                memory.copy_(run[part], non_blocking=True)
                buffer.target = slot[part]
            buffer.event = self.device.record()

    def _next_buffer(self) -> _RingBuffer:
        if len(self._ring) < _RING_BUFFERS:
            self._ring.append(_RingBuffer(self.device.pinned(_RING_BUFFER_BYTES)))
        else:
            self._ring.rotate(-1)
            self._free(self._ring[-1])
        return self._ring[-1]

    def _free(self, buffer: _RingBuffer) -> None:
        if buffer.event is not None:
            buffer.event.synchronize()
        if buffer.target is not None:
            buffer.target.copy_(buffer.memory[: buffer.target.numel()])
        buffer.event = buffer.target = None
