"""The memory that a node cache shares with its clients: an anonymous file, passed by descriptor.

It has no name, so /dev/shm's size and leftovers don't matter, and the kernel frees it when the last
process that maps it has gone, however that one ended.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ucm.errors import ConfigError

_MADV_POPULATE_WRITE = 23
_MEMINFO = Path("/proc/meminfo")
_CGROUPS = Path("/sys/fs/cgroup")
_NAMES_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_CGROUPS_OF_SELF = Path("/proc/self/cgroup")
_PAGE_BYTES = mmap.PAGESIZE


class MappedMemory:
    """The memory behind a descriptor, mapped into this process for as long as the object lives."""

    def __init__(self, fd: int, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._map = mmap.mmap(fd, capacity_bytes)
        self._view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def page(self, offset: int, nbytes: int) -> memoryview:
        """A writable view. Whoever holds it must be counted by a slot's state or pins."""
        return self._view[offset : offset + nbytes]

    def populate(self, offset: int, nbytes: int) -> None:
        """Takes the pages of a range now, off the critical path. Best effort; threads may race."""
        populate(self.address + offset, nbytes)


class SharedMemory(MappedMemory):
    """`capacity_bytes` of new memory. The creator owns `fd`; pages are taken as they are first
    used."""

    def __init__(self, capacity_bytes: int) -> None:
        self.fd = os.memfd_create("ucm-node-cache", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, capacity_bytes)
        super().__init__(self.fd, capacity_bytes)


def populate(address: int, nbytes: int) -> None:
    """Asks the kernel for a range's pages and page-table entries. Old kernels refuse: no harm, the
    first use pays instead. ctypes gives up the GIL meanwhile, which mmap.madvise would not."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = address // _PAGE_BYTES * _PAGE_BYTES
    libc.madvise(start, address + nbytes - start, _MADV_POPULATE_WRITE)


def default_capacity_bytes() -> int:
    """A quarter of the memory that is available now, on this machine and in this container."""
    for line in _MEMINFO.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available_bytes = int(line.split()[1]) * 1024
            return min([available_bytes, *_left_in_cgroups()]) // 4
    raise ConfigError(
        f"cache_buffer_capacity_gb: not set, and {_MEMINFO} does not say how much memory is "
        f"available on this {sys.platform} machine; set it"
    )


def _left_in_cgroups() -> list[int]:
    """What each memory limit above this process leaves; the slots count against all of them."""
    return [
        max(0, limit_bytes - used_bytes)
        for group, limit, used, idle in _memory_groups()
        if (limit_bytes := _number_in(group / limit)) is not None
        and (used_bytes := _working_set(group, used, idle)) is not None
    ]


def _working_set(group: Path, used: str, idle: str) -> int | None:
    """What the kernel could not give back at once: cached files that nobody reads are free."""
    used_bytes = _number_in(group / used)
    idle_bytes = _number_in(group / "memory.stat", line=idle)
    return None if used_bytes is None else used_bytes - (idle_bytes or 0)


def _number_in(path: Path, *, line: str = "") -> int | None:
    """The number in a file, or behind a name in a file of many; None if there is none ("max")."""
    try:
        words = path.read_text().split()
        return int(words[words.index(line) + 1] if line else words[0])
    except (OSError, ValueError, IndexError):
        return None


def _memory_groups() -> Iterator[tuple[Path, str, str, str]]:
    """The memory groups of this process, up to the root, and their files' names (v2 and v1)."""
    try:
        lines = _CGROUPS_OF_SELF.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = _CGROUPS / "memory", _NAMES_V1
        else:
            continue
        # Inside a container the path may be the host's: what can't be read is skipped.
        group = root / path.lstrip("/")
        for each in (group, *group.parents):
            yield each, *names
            if each == root:
                break
