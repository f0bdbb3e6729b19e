"""The memory that a node cache shares with its clients: an anonymous file, passed by descriptor.

It has no name, so /dev/shm's size and leftovers don't matter, and the kernel frees it when the last
process that maps it has gone, however that one ended.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
from contextlib import suppress
from functools import cache

_MADV_POPULATE_WRITE = 23
_STEP_BYTES = 1 << 20
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PAGE_BYTES = mmap.PAGESIZE
# A nice value: a third of the weight of those that have none.
_GIVEN_WAY = 5


class MappedMemory:
    """The memory behind a descriptor, mapped into this process for as long as the object lives."""

    def __init__(self, fd: int, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._map = mmap.mmap(fd, capacity_bytes)
        keep_out_of_core_dumps(self._map)
        self._view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def page(self, offset: int, nbytes: int) -> memoryview:
        """A writable view. Whoever holds it must be counted by a slot's state or pins."""
        return self._view[offset : offset + nbytes]

    def populate(self, offset: int, nbytes: int) -> None:
        """Takes the pages of a range now. Best effort; threads may race."""
        populate(self.address + offset, nbytes)


class SharedMemory(MappedMemory):
    """`capacity_bytes` of new memory. The creator owns `fd`; pages are taken as they are first
    used."""

    def __init__(self, capacity_bytes: int) -> None:
        self.fd = os.memfd_create("ucm-node-cache", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, capacity_bytes)
        # Every process that has the descriptor could cut it short otherwise: the next touch of what
        # is gone ends all the others.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        super().__init__(self.fd, capacity_bytes)


def keep_out_of_core_dumps(mapping: mmap.mmap) -> None:
    """Pages are what people have asked a model, and as large as the cache."""
    with suppress(OSError):
        mapping.madvise(mmap.MADV_DONTDUMP)


def populate(address: int, nbytes: int) -> None:
    """Asks the kernel for a range's pages and page-table entries. Old kernels refuse: no harm, the
    first use pays instead. ctypes gives up the GIL meanwhile, which mmap.madvise would not. In
    steps, because the kernel holds the process's memory map meanwhile, which others want to
    change."""
    end = address + nbytes
    for start in range(address // _PAGE_BYTES * _PAGE_BYTES, end, _STEP_BYTES):
        _libc().madvise(start, min(_STEP_BYTES, end - start), _MADV_POPULATE_WRITE)


def give_way() -> None:
    """The calling thread gets the smaller part of a core that others want. A forward pass on the
    CPU waits for the slowest of its threads, so whoever takes a core from it slows down all of it.
    Not the least part: a thread of Python that gives the interpreter's lock to another one waits
    until that has run, so on a busy machine the lowest priority of one thread is everybody's. Not
    SCHED_IDLE either: a killed process holds its files until all its threads got to run."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _GIVEN_WAY)


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
