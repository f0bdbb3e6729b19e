"""The slots' memory, as one rank maps it.

One `Arena` is the memory of one node cache incarnation, mapped from its memfd. It stays mapped for
as long as the object lives, so a copy that is still running when its node cache dies writes into
memory that nobody else uses any more.

Where there is an accelerator, the parts in use are pinned (`prepare`), in the background and part
by part, because pinning touches every page. What isn't pinned yet, or can't be (no such call on
this accelerator, a limit on locked memory), is copied by way of a small pinned ring; the copy
engine asks `pieces` which is which. Where there is none, `prepare` only fills the page table, so
that the first copies don't: a first touch costs 0.5 to 1 us per 4 KiB, as much as the copy itself
three times over.

Threads: everything may be called from any thread. A copy engine holds the arena (`hold`, `release`)
from a job's submission to its end. `close` waits for the holders, bounded, then unpins; if time
runs out the last holder to let go unpins.
"""

from __future__ import annotations

import bisect
import logging
import mmap
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ucm.store.node.memory import populate

logger = logging.getLogger(__name__)

_CLOSE_S = 10.0


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes [start, start + nbytes) of an arena, all pinned by one registration, or not."""

    start: int
    nbytes: int
    pinned: bool

    @property
    def end(self) -> int:
        return self.start + self.nbytes


class Arena:
    """The memory of one node cache incarnation, `name`. `bytes` is all of it, as flat uint8."""

    def __init__(
        self, mapping: mmap.mmap, *, device: torch.device | None = None, name: str = ""
    ) -> None:
        self.name = name
        self.bytes: Tensor = torch.frombuffer(mapping, dtype=torch.uint8)
        self._device = device if device is not None and device.type != "cpu" else None
        self._as_dtype = {torch.uint8: self.bytes}
        # Guards everything below. Registering happens outside of it, one thread at a time.
        self._cond = threading.Condition()
        self._registering = threading.Lock()
        self._registered: list[Piece] = []
        self._holders = 0
        self._closed = False
        self._can_register = self._device is not None and self._device.type == "cuda"

    @property
    def pins(self) -> bool:
        """Whether `prepare` pins memory for an accelerator."""
        return self._device is not None

    def typed(self, dtype: torch.dtype) -> Tensor:
        """All of the memory as one flat tensor of another dtype (a tail that doesn't fit is left
        out)."""
        view = self._as_dtype.get(dtype)
        if view is None:
            usable = self.bytes.numel() - self.bytes.numel() % dtype.itemsize
            view = self._as_dtype[dtype] = self.bytes[:usable].view(dtype)
        return view

    def prepare(self, start: int, nbytes: int) -> None:
        """Makes [start, start + nbytes), whole pages of memory, fast to copy to and from. For a
        thread of its own; may be called again for what overlaps."""
        if self._device is not None:
            self.register_extent(start, nbytes)
        else:
            populate(self._address(start), nbytes)

    def register_extent(self, start: int, nbytes: int) -> bool:
        """Pins what isn't pinned yet. False: not (all of it) possible here."""
        with self._registering:
            for piece in self.pieces(start, nbytes):
                if piece.pinned:
                    continue
                if self._closed or not self._can_register:
                    return False
                if not _pin(self._address(piece.start), piece.nbytes, self._device):
                    self._can_register = False
                    return False
                with self._cond:
                    pinned = Piece(piece.start, piece.nbytes, pinned=True)
                    bisect.insort(self._registered, pinned, key=lambda p: p.start)
        return True

    def pieces(self, start: int, nbytes: int) -> list[Piece]:
        """[start, start + nbytes) cut where pinning changes: no copy by a device may cross that."""
        assert 0 <= start <= start + nbytes <= self.bytes.numel(), f"{start} + {nbytes}"
        with self._cond:
            first = bisect.bisect_right(self._registered, start, key=lambda p: p.end)
            found: list[Piece] = []
            position, end = start, start + nbytes
            for known in self._registered[first:]:
                if known.start >= end:
                    break
                if known.start > position:
                    found.append(Piece(position, known.start - position, pinned=False))
                    position = known.start
                cut = min(known.end, end)
                found.append(Piece(position, cut - position, pinned=True))
                position = cut
            if position < end:
                found.append(Piece(position, end - position, pinned=False))
            return found

    def hold(self) -> None:
        """Keeps the memory pinned until `release`."""
        with self._cond:
            if self._closed:
                raise RuntimeError("this arena is closed: its node cache is gone")
            self._holders += 1

    def release(self) -> None:
        with self._cond:
            assert self._holders > 0, "released more often than held"
            self._holders -= 1
            unpin = self._closed and self._holders == 0
            self._cond.notify_all()
        if unpin:
            self._unpin()

    def close(self, *, timeout_s: float = _CLOSE_S) -> bool:
        """No new holders; unpins when the present ones are gone. False: they are not, yet."""
        deadline = time.monotonic() + timeout_s
        with self._cond:
            self._closed = True
            while self._holders and (left_s := deadline - time.monotonic()) > 0:
                self._cond.wait(left_s)
            if self._holders:
                logger.warning(
                    "%d copies still use the memory of a node cache that is gone; it is unpinned "
                    "when they end",
                    self._holders,
                )
                return False
        self._unpin()
        return True

    def _address(self, start: int) -> int:
        return self.bytes.data_ptr() + start

    def _unpin(self) -> None:
        with self._registering:
            with self._cond:
                pinned, self._registered = self._registered, []
            for piece in pinned:
                _unpin(self._address(piece.start), self._device)


# The one place that names an accelerator's own call. Torch has no generic one for memory that it
# did not allocate; CUDA and ROCm share this.


def _pin(address: int, nbytes: int, device: torch.device | None) -> bool:
    with torch.cuda.device(device):
        error = _cudart().cudaHostRegister(address, nbytes, 0)
        if int(error.value) == 0:
            return True
        _forget_last_error(device)
    logger.warning(
        "can't pin %d MiB of the node cache's memory (%s): copies go through a pinned ring; "
        "check the limit on locked memory (ulimit -l)",
        nbytes >> 20,
        error,
    )
    return False


def _unpin(address: int, device: torch.device | None) -> None:
    with torch.cuda.device(device):
        error = _cudart().cudaHostUnregister(address)
    if int(error.value) != 0:
        logger.warning("can't unpin memory of a node cache that is gone (%s)", error)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _forget_last_error(device: torch.device | None) -> None:
    """CUDA keeps a failed call's error until the thread's next kernel launch, which raises it."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError:
        pass
