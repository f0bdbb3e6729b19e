"""The memory that a node cache shares with its clients: an anonymous file, passed by descriptor.

It has no name, so /dev/shm's size and leftovers don't matter, and the kernel frees it when the last
process that maps it has gone, however that one ended.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

from ucm.errors import ConfigError

_MADV_POPULATE_WRITE = 23
_MEMINFO = Path("/proc/meminfo")
_PAGE_BYTES = mmap.PAGESIZE


class SharedMemory:
    """`capacity_bytes` of memory. The creator owns `fd`; pages are taken as they are first used."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.fd = os.memfd_create("ucm-node-cache", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, capacity_bytes)
        self._map = mmap.mmap(self.fd, capacity_bytes)
        self._view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def page(self, offset: int, nbytes: int) -> memoryview:
        """A writable view. Whoever holds it must be counted by a slot's state or pins."""
        return self._view[offset : offset + nbytes]

    def populate(self, offset: int, nbytes: int) -> None:
        """Takes the pages of a range now, off the critical path. Best effort; threads may race."""
        populate(self._address + offset, nbytes)


def populate(address: int, nbytes: int) -> None:
    """Asks the kernel for a range's pages and page-table entries. Old kernels refuse: no harm, the
    first use pays instead. ctypes gives up the GIL meanwhile, which mmap.madvise would not."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = address // _PAGE_BYTES * _PAGE_BYTES
    libc.madvise(start, address + nbytes - start, _MADV_POPULATE_WRITE)


def default_capacity_bytes() -> int:
    """A quarter of the memory that is available now."""
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 // 4
    raise ConfigError(
        f"cache_buffer_capacity_gb: not set, and {_MEMINFO} does not say how much memory is "
        f"available on this {sys.platform} machine; set it"
    )
