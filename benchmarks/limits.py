"""What this machine can do: memcpy, and plain files with plain threads. The yardsticks of store.py.

The readers are as lean as Python lets them be (no futures, no checks, no checksums), and read into
as much memory as the store fills: into a small buffer that stays in the CPU's cache they would be
half as fast again, and measure something else.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

_NUM_DIRECTORIES = 64


def memory(nbytes: int) -> np.ndarray:
    """`nbytes` of memory that is really there."""
    return np.full(nbytes, 1, dtype=np.uint8)


def memcpy_s(target: np.ndarray, source: np.ndarray) -> float:
    """Seconds for one thread to copy one array to another."""
    started_s = time.perf_counter()
    ctypes.memmove(target.ctypes.data, source.ctypes.data, source.nbytes)
    return time.perf_counter() - started_s


def write_files_s(folder: Path, source: np.ndarray, *, num_files: int, num_threads: int) -> float:
    """Seconds to write `source` to new files of equal size, in several directories: one alone is
    locked by each file that is made."""
    pages = source.reshape(num_files, -1)
    directories = [folder / f"directory {i}" for i in range(_NUM_DIRECTORIES)]
    for directory in directories:
        directory.mkdir()

    def write(i: int) -> None:
        path = directories[i % _NUM_DIRECTORIES] / str(i)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.pwrite(fd, pages[i].data, 0)
        os.close(fd)

    return with_threads(write, num_files, num_threads)


def read_files_s(
    files: list[str], target: np.ndarray, *, skip_bytes: int, num_threads: int
) -> float:
    """Seconds to read files of equal size, from `skip_bytes` on, into `target`."""
    pages = target.reshape(len(files), -1)

    def read(i: int) -> None:
        fd = os.open(files[i], os.O_RDONLY)
        os.preadv(fd, [pages[i].data], skip_bytes)
        os.close(fd)

    return with_threads(read, len(files), num_threads)


def with_threads(act: Callable[[int], None], count: int, num_threads: int) -> float:
    numbers = iter(range(count))
    lock = threading.Lock()

    def take() -> Iterator[int]:
        # A few at a time: taking turns should not be what is measured.
        while True:
            with lock:
                some = [number for number, _ in zip(numbers, range(8), strict=False)]
            if not some:
                return
            yield from some

    def work() -> None:
        for i in take():
            act(i)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    started_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started_s
