"""Pinning memory that torch did not allocate: the one place that names an accelerator's own call.

Torch has no generic one; CUDA and ROCm share this. A registration is a call into the driver that
may take a while and keeps other calls of the process out meanwhile, and one that CUDA refuses
(error 900) while any thread of the process captures a graph. So who registers does it in small
pieces and tries again (`pinning.py`). Nothing here launches a kernel: that would disturb a capture
more than the registration does.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


class MemoryRegistrar(Protocol):
    """Pins and unpins ranges of this process's memory. Any thread."""

    def register(self, address: int, nbytes: int) -> str:
        """Why it could not; empty if it could."""

    def unregister(self, address: int) -> str:
        """What was registered at `address`, all of it. Why it could not, as above."""


class CudaRegistrar:
    """cudaHostRegister, of the runtime that torch has loaded.

    A failed call leaves its error with the calling thread, whose next kernel launch would raise it:
    threads that register launch none.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def register(self, address: int, nbytes: int) -> str:
        with torch.cuda.device(self._device):
            return _said(_cudart().cudaHostRegister(address, nbytes, 0))

    def unregister(self, address: int) -> str:
        with torch.cuda.device(self._device):
            return _said(_cudart().cudaHostUnregister(address))


def registrar_for(device: torch.device | None) -> MemoryRegistrar | None:
    """None: memory can't be registered there, and copies go by the ring."""
    return CudaRegistrar(device) if device is not None and device.type == "cuda" else None


def _said(error: Any) -> str:
    return "" if int(error.value) == 0 else str(error)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
