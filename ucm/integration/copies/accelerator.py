"""The door to the device: everything that copies ask of it, by torch's generic calls.

The tests put main memory, and a device that works behind the host's back, behind this door; the
benchmarks count what goes through it. Nothing else in the copy code calls the device.

Streams are current per thread: all methods but `empty` and `pinned` are about the calling thread's,
and what they ask for happens in the order of that stream, later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Copies of (sources, targets, bytes): raw addresses, all int64 tensors in main memory.
BatchedCopy: TypeAlias = Callable[[Tensor, Tensor, Tensor], None]

# Pinned buffers are pooled by size: block ids come in buffers of one size, if they fit.
_MIN_IDS = 8192
_WARM_BUFFERS = 8


class DeviceEvent(Protocol):
    """A point in the work of a stream: torch.Event, as far as copies need it."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class Accelerator:
    """One device. `batched`: many copies in one call into the driver, where the engine has that.
    Its three tensors are kept until the copies have happened."""

    def __init__(self, device: torch.device, *, batched: BatchedCopy | None = None) -> None:
        self.device = device
        self.batched = batched
        self._gathers_straight = True
        self._warned: set[str] = set()
        # Torch keeps them for the next who asks. Allocating one later may wait for the device.
        warm = [self.pinned(8 * _MIN_IDS) for _ in range(_WARM_BUFFERS)]
        del warm

    def use_own_stream(self) -> None:
        """Gives the calling thread a stream that no other thread uses."""
        torch.accelerator.set_stream(torch.Stream(device=self.device))

    def record(self) -> DeviceEvent:
        """A point after everything that the current stream holds now."""
        return torch.accelerator.current_stream(self.device).record_event()

    def wait(self, event: DeviceEvent) -> None:
        """Later work on the current stream comes after `event`. The host doesn't wait."""
        assert isinstance(event, torch.Event)
        torch.accelerator.current_stream(self.device).wait_event(event)

    def empty(self, nbytes: int) -> Tensor:
        """Memory on the device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def pinned(self, nbytes: int) -> Tensor:
        """A host buffer that the device can copy from by itself, or failing that any."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            self._warn_once("copies go through memory that is not pinned", error)
            return torch.empty(nbytes, dtype=torch.uint8)

    def upload(self, ids: npt.NDArray[np.int64]) -> Tensor:
        """An index tensor. From pinned memory: a driver may make who uploads from any other wait
        until the stream gets there."""
        room = max(_MIN_IDS, 1 << max(0, ids.size - 1).bit_length())
        host = self.pinned(8 * room).view(torch.int64)[: ids.size]
        host.copy_(torch.from_numpy(ids))
        # Torch keeps the buffer from others until this copy has happened.
        return host.to(self.device, non_blocking=True)

    def copy(self, into: Sequence[Tensor], out_of: Sequence[Tensor]) -> None:
        """Runs of bytes, one by one. In one call: torch then issues them without coming back to
        Python, where each could wait for the interpreter lock."""
        torch._foreach_copy_(list(into), list(out_of), non_blocking=True)

    def gather(self, blocks: Tensor, ids: Tensor, into: Tensor) -> None:
        """`into` = blocks[:, ids]: straight into it, where the device has a kernel for that."""
        if self._gathers_straight:
            try:
                torch.ops.aten.index.Tensor_out(blocks, [None, ids], out=into)
                return
            except NotImplementedError as error:
                self._gathers_straight = False
                self._warn_once("copies need more memory on this device", error)
        into.copy_(blocks[:, ids])

    def scatter(self, blocks: Tensor, ids: Tensor, out_of: Tensor) -> None:
        """blocks[:, ids] = `out_of`."""
        blocks[:, ids] = out_of

    def _warn_once(self, what: str, error: Exception) -> None:
        """It is tried again each time, where it isn't a matter of the device's kind."""
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("%s: %s", what, error)
