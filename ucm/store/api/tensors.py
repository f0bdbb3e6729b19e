"""Rows of torch tensors for the store API: the only file of the store that knows torch.

Tensors in host memory are plain memory. Those on a device are copied through torch, in order: after
what the caller's stream had queued when the task began, and before the task ends.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ucm.store.api.buffers import HostRow, Row

Tensors: TypeAlias = Sequence[Sequence[torch.Tensor]]


def tensor_rows(rows: Tensors, sizes: Sequence[int]) -> list[Row]:
    """Raises ValueError for a row that is not `sizes`."""
    return [_tensor_row(row, sizes) for row in rows]


def _tensor_row(tensors: Sequence[torch.Tensor], sizes: Sequence[int]) -> Row:
    found = [tensor.numel() * tensor.element_size() for tensor in tensors]
    if found != list(sizes):
        raise ValueError(f"a row of tensors of {found} bytes, a shard has {list(sizes)}")
    if all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors):
        return HostRow([tensor.data_ptr() for tensor in tensors], sizes, owners=tuple(tensors))
    return TensorRow(tuple(tensors), _events(tensors))


@dataclass(frozen=True, slots=True)
class TensorRow(Row):
    """Tensors on any device, with any strides. `events` have passed when they may be touched."""

    tensors: tuple[torch.Tensor, ...]
    events: tuple[torch.Event, ...]

    def load_from(self, address: int) -> None:
        self._wait()
        with torch.no_grad():
            for tensor in self.tensors:
                page = _bytes_at(address, tensor)
                if tensor.is_contiguous():
                    _flat(tensor).copy_(page)
                else:
                    packed = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                    _flat(packed).copy_(page)
                    tensor.copy_(packed)
                address += page.numel()
        # The slot is given back after this, and the caller uses the tensors on streams of its own.
        for device in {tensor.device for tensor in self.tensors if tensor.device.type != "cpu"}:
            torch.accelerator.current_stream(device).synchronize()

    def dump_to(self, address: int) -> None:
        self._wait()
        with torch.no_grad():
            for tensor in self.tensors:
                page = _bytes_at(address, tensor)
                page.copy_(_flat(tensor.contiguous()))
                address += page.numel()

    def _wait(self) -> None:
        for event in self.events:
            event.synchronize()


def _events(tensors: Sequence[torch.Tensor]) -> tuple[torch.Event, ...]:
    devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
    return tuple(torch.accelerator.current_stream(device).record_event() for device in devices)


def _bytes_at(address: int, tensor: torch.Tensor) -> torch.Tensor:
    """The part of a page that is `tensor`'s, as bytes: any offset will do for those."""
    nbytes = tensor.numel() * tensor.element_size()
    memory = (ctypes.c_char * nbytes).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)
