"""The slots' memory, as one rank maps it.

One `Arena` is the memory of one node cache incarnation, mapped from its memfd. It stays mapped for
as long as the object lives, so a copy that is still running when its node cache dies writes into
memory that nobody else uses any more.

Where there is an accelerator, the parts in use are pinned (`prepare`), in the background and piece
by piece (`pinning.py`), because pinning touches every page. What isn't pinned yet, or can't be (no
such call on this accelerator, a refusal), is copied by way of a small pinned ring; the copy engine
asks `pieces` or `whole` which is which. Where there is none, `prepare` only fills the page table,
so that the first copies don't: a first touch costs 0.5 to 1 us per 4 KiB, as much as the copy
itself three times over.

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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ucm.integration.copies.registration import MemoryRegistrar, registrar_for
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
        self,
        mapping: mmap.mmap,
        *,
        device: torch.device | None = None,
        name: str = "",
        registrar: MemoryRegistrar | None = None,
    ) -> None:
        self.name = name
        self.bytes: Tensor = torch.frombuffer(mapping, dtype=torch.uint8)
        on_device = device is not None and device.type != "cpu"
        self._registrar = registrar or registrar_for(device if on_device else None)
        # Whether `prepare` is for an accelerator, be it one that can't pin this memory.
        self.pins = on_device or registrar is not None
        self._as_dtype = {torch.uint8: self.bytes}
        # Guards everything below. Registering happens outside of it, one thread at a time.
        self._cond = threading.Condition()
        self._registering = threading.Lock()
        self._registered: list[Piece] = []
        self._holders = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def typed(self, dtype: torch.dtype) -> Tensor:
        """All of the memory as one flat tensor of another dtype (an item that doesn't fit at the
        end is left out)."""
        view = self._as_dtype.get(dtype)
        if view is None:
            usable = self.bytes.numel() - self.bytes.numel() % dtype.itemsize
            view = self._as_dtype[dtype] = self.bytes[:usable].view(dtype)
        return view

    def prepare(self, start: int, nbytes: int) -> str:
        """Makes [start, start + nbytes), whole pages of memory, fast to copy to and from; says why
        it could not (try again), or nothing. May be called again for what overlaps."""
        if self._registrar is not None:
            return self._register(start, nbytes)
        if not self.pins:
            populate(self._address(start), nbytes)
        return ""

    def _register(self, start: int, nbytes: int) -> str:
        """Pins what isn't pinned yet."""
        assert self._registrar is not None
        with self._registering:
            for piece in self.pieces(start, nbytes):
                if piece.pinned:
                    continue
                if self._closed:
                    return ""
                if refused := self._registrar.register(self._address(piece.start), piece.nbytes):
                    return refused
                with self._cond:
                    pinned = Piece(piece.start, piece.nbytes, pinned=True)
                    bisect.insort(self._registered, pinned, key=lambda p: p.start)
        return ""

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

    def whole(
        self, starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Which of these ranges lie in one pinned piece each: one `pieces` for thousands."""
        if starts.size:
            low, high = int(starts.min()), int((starts + sizes).max())
            assert 0 <= low <= high <= self.bytes.numel(), f"{low} to {high}"
        with self._cond:
            registered = [(piece.start, piece.end) for piece in self._registered]
        if not registered:
            return np.zeros(starts.shape, dtype=np.bool_)
        table = np.array(registered, dtype=np.int64)
        at = np.searchsorted(table[:, 0], starts, side="right") - 1
        inside: npt.NDArray[np.bool_] = starts + sizes <= table[np.maximum(at, 0), 1]
        return inside & (at >= 0)

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
                assert self._registrar is not None, "registered by nobody"
                if refused := self._registrar.unregister(self._address(piece.start)):
                    logger.warning("can't unpin memory of a node cache that is gone (%s)", refused)
