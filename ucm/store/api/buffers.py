"""Rows: the tensors of one shard in a user's memory, and copying them to and from a page.

A row of the store API is a list with one entry per tensor. An entry of `load_data` and `dump_data`
is an address (as in UCM: memory of this process that the caller keeps alive until the task has
ended) or any object with a buffer, which the row keeps alive itself. Tensors are in tensors.py.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


class Row(ABC):
    """The memory of one shard. Copies run on the store's thread, one at a time, without the GIL."""

    @abstractmethod
    def load_from(self, address: int) -> None:
        """Fills the user's memory from the shard at `address`."""

    @abstractmethod
    def dump_to(self, address: int) -> None:
        """Fills the shard at `address` from the user's memory."""


@dataclass(frozen=True, slots=True)
class HostRow(Row):
    """Plain memory: `addresses[i]` holds `sizes[i]` bytes. `owners` are kept alive."""

    addresses: Sequence[int]
    sizes: Sequence[int]
    owners: Sequence[object] = ()

    def load_from(self, address: int) -> None:
        for target, nbytes in zip(self.addresses, self.sizes, strict=True):
            ctypes.memmove(target, address, nbytes)
            address += nbytes

    def dump_to(self, address: int) -> None:
        for source, nbytes in zip(self.addresses, self.sizes, strict=True):
            ctypes.memmove(address, source, nbytes)
            address += nbytes


def host_row(entries: Sequence[object], sizes: Sequence[int], *, writable: bool) -> HostRow:
    """Raises ValueError when there are too many or too few entries, or a buffer of another size."""
    if len(entries) != len(sizes):
        raise ValueError(f"a row of {len(entries)} entries, a shard has {len(sizes)} tensors")
    places = [_place(entry, size, writable) for entry, size in zip(entries, sizes, strict=True)]
    addresses = [address for address, _ in places]
    if not all(addresses):
        raise ValueError("an address is 0")
    return HostRow(addresses, sizes, [owner for _, owner in places])


def _place(entry: object, nbytes: int, writable: bool) -> tuple[int, object]:
    """The address of an entry, and what keeps it there."""
    if isinstance(entry, (int, np.integer)):
        # First, because a NumPy integer has a buffer, too: its own.
        return int(entry), None
    view = memoryview(entry)  # type: ignore[arg-type]
    if view.nbytes != nbytes:
        raise ValueError(f"a buffer of {view.nbytes} bytes for a tensor of {nbytes}")
    if not view.c_contiguous:
        raise ValueError("a buffer that is not contiguous")
    if view.readonly and writable:
        raise ValueError("a read-only buffer can't be loaded into")
    # Not ctypes, which gives no address of memory that may not be written.
    array = np.frombuffer(view, dtype=np.uint8)
    return int(array.__array_interface__["data"][0]), array
