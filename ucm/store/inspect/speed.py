"""What a directory's filesystem gives at the size of a page: pages per second, by threads.

Files are those of the store, with header and checksums, written under a temporary name and renamed,
in a folder of their own that is removed. Between writing and reading they are flushed and this
machine's page cache is asked to forget them, so that storage is read and not memory.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Final

import msgspec

from ucm.errors import TierError
from ucm.store.blocks.blockfile import BlockId, Scratch, read_block, write_block
from ucm.store.blocks.keys import KEY_BYTES, Key
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.tiers.posix.os_errors import tier_error, translated
from ucm.store.tiers.posix.quarantine import forget_cached

FOLDER_START: Final = "ucm-probe-"
NUM_THREADS: Final = (1, 4, 16)
# Threads whose pages take more together are left out.
MAX_MEMORY_BYTES: Final = 2 << 30
_CHUNK_BYTES: Final = 8 << 20
_RANDOM_BYTES: Final = 1 << 20
_BLOCK_TOKENS: Final = 128
_FINGERPRINT: Final = bytes(32)


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """`op` is "write" or "read"; `num_threads` at a time. `problem`: why there is no number."""

    op: str
    is_direct: bool
    num_threads: int
    pages_per_s: float
    bytes_per_s: float
    problem: str = ""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Of one directory. `dd_write` and `dd_read` are bytes per second; None without a dd."""

    directory: str
    page_bytes: int
    speeds: list[Speed]
    dd_write: float | None
    dd_read: float | None


@dataclass(frozen=True)
class ProbeLoad:
    """How much is measured: so many bytes in files of pages, or what gets done in `seconds`, each
    time. Whoever sets `stop` ends it at once."""

    page_bytes: int
    max_bytes: int
    seconds: float
    max_files: int = 1 << 20
    stop: Event = field(default_factory=Event)

    @property
    def num_files(self) -> int:
        return max(2, min(self.max_files, self.max_bytes // padded_bytes(self.page_bytes)))

    def in_what_is_free(self, directory: str) -> ProbeLoad:
        """With at most a tenth of what is free there: others write meanwhile. Raises OSError."""
        of = os.statvfs(directory)
        free_bytes, free_files = of.f_bavail * of.f_frsize, of.f_favail
        return replace(
            self,
            max_bytes=min(self.max_bytes, free_bytes // 10) if of.f_blocks else self.max_bytes,
            max_files=min(self.max_files, free_files // 10) if of.f_files else self.max_files,
        )


@contextlib.contextmanager
def own_folder(directory: str) -> Iterator[str]:
    """A new folder in `directory`, removed with all that is in it. Raises TierError."""
    try:
        folder = tempfile.mkdtemp(prefix=FOLDER_START, dir=directory)
    except OSError as error:
        raise tier_error(directory, "no folder can be made to try it with", error) from error
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except KeyboardInterrupt:
            # It came while this was at it.
            shutil.rmtree(folder, ignore_errors=True)
            raise


def measure_all(
    directory: str, load: ProbeLoad, *, on_progress: Callable[[int, int], None]
) -> Measured:
    """With 1, 4 and 16 threads, with and without O_DIRECT, and with dd. Raises TierError."""
    speeds: list[Speed] = []
    with own_folder(directory) as folder, translated(directory, "can't be measured"):
        test = SpeedTest(folder, load, NUM_THREADS)
        total = 4 * len(test.num_threads)
        for is_direct, num_threads in itertools.product((False, True), test.num_threads):
            speeds.append(test.write(num_threads, is_direct=is_direct))
            on_progress(len(speeds), total)
            speeds.append(test.read(num_threads, is_direct=is_direct))
            on_progress(len(speeds), total)
        # No more than was done in the time that one measurement has.
        dd_write, dd_read = dd_bytes_per_s(folder, replace(load, max_files=test.most_files))
    return Measured(
        directory=directory,
        page_bytes=load.page_bytes,
        speeds=speeds,
        dd_write=dd_write,
        dd_read=dd_read,
    )


class SpeedTest:
    """In one folder, which is its own. `num_threads` are those whose pages there is memory for;
    `most_files` is the most that one call has written."""

    def __init__(self, folder: str, load: ProbeLoad, num_threads: Sequence[int]) -> None:
        """Raises OSError."""
        self._folder = folder
        self._load = load.in_what_is_free(folder)
        most = max(1, MAX_MEMORY_BYTES // padded_bytes(load.page_bytes))
        self.num_threads = [number for number in num_threads if number <= most]
        self._buffers = [_Buffer(load.page_bytes) for _ in range(max(self.num_threads))]
        self._written: list[str] = []
        self.most_files = 0

    @property
    def has_files(self) -> bool:
        """There is something to read."""
        return bool(self._written)

    def write(self, num_threads: int, *, is_direct: bool = False) -> Speed:
        """New files, renamed when they are whole. Those of the last call are what `read` reads."""
        for path in self._written:
            os.unlink(path)
        self._written = []
        numbers = itertools.count()

        def write_one(buffer: _Buffer) -> None:
            path = f"{self._folder}/{next(numbers)}"
            self._write(path, os.O_DIRECT if is_direct else 0, buffer)
            self._written.append(path)

        measured = self._measure("write", num_threads, write_one, is_direct=is_direct)
        self.most_files = max(self.most_files, len(self._written))
        return measured

    def read(self, num_threads: int, *, is_direct: bool = False) -> Speed:
        """Each file once, verified, as far as storage has to be asked."""
        for path in self._written:
            if not self._load.stop.is_set():
                _forget(path)
        left = list(self._written)

        def read_one(buffer: _Buffer) -> None:
            if left:
                self._read(left.pop(), os.O_DIRECT if is_direct else 0, buffer)

        return self._measure("read", num_threads, read_one, is_direct=is_direct)

    def _measure(
        self, op: str, num_threads: int, act: Callable[[_Buffer], None], *, is_direct: bool
    ) -> Speed:
        num_files = self._load.num_files if op == "write" else len(self._written)
        turns = iter(range(num_files))
        started_s = time.monotonic()
        deadline_s = started_s + self._load.seconds

        def work(buffer: _Buffer) -> tuple[int, str]:
            num_done, stop = 0, self._load.stop
            try:
                while (
                    not stop.is_set()
                    and time.monotonic() < deadline_s
                    and next(turns, None) is not None
                ):
                    act(buffer)
                    num_done += 1
            except (OSError, TierError) as error:
                return num_done, _problem(error)
            return num_done, ""

        with ThreadPoolExecutor(num_threads) as threads:
            try:
                ends = list(threads.map(work, self._buffers[:num_threads]))
            except KeyboardInterrupt:
                self._load.stop.set()
                raise
        num_done = sum(number for number, _ in ends)
        per_s = num_done / max(1e-6, time.monotonic() - started_s)
        return Speed(
            op=op,
            is_direct=is_direct,
            num_threads=num_threads,
            pages_per_s=round(per_s, 2),
            bytes_per_s=round(per_s * self._load.page_bytes),
            problem=next(
                (problem for _, problem in ends if problem),
                "" if num_files else "nothing could be written",
            ),
        )

    def _block(self, path: str) -> BlockId:
        number = int(os.path.basename(path))
        return BlockId(Key(number.to_bytes(KEY_BYTES, "big")), _FINGERPRINT, self._load.page_bytes)

    def _write(self, path: str, flags: int, buffer: _Buffer) -> None:
        temporary = f"{path}.tmp"
        try:
            self._write_new(temporary, self._block(path), flags, buffer)
            os.rename(temporary, path)
        except BaseException:
            # What there is of it would be in the way of the next one.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def _write_new(self, path: str, block: BlockId, flags: int, buffer: _Buffer) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | flags, 0o600)
        try:
            write_block(fd, block, buffer.page, num_tokens=_BLOCK_TOKENS, scratch=buffer.scratch)
        finally:
            os.close(fd)

    def _read(self, path: str, flags: int, buffer: _Buffer) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
        try:
            block, scratch = self._block(path), buffer.scratch
            read_block(fd, block, buffer.page, scratch=scratch, chunk_bytes=_CHUNK_BYTES)
        finally:
            os.close(fd)


class _Buffer:
    """A thread's memory for one page, which is there before anything is measured."""

    def __init__(self, page_bytes: int) -> None:
        self.scratch = Scratch()
        self.page = memoryview(mmap.mmap(-1, padded_bytes(page_bytes)))
        # Not zeros, which some storage keeps for nothing; drawing all of it takes too long.
        some = os.urandom(min(_RANDOM_BYTES, page_bytes))
        for start in range(0, page_bytes, len(some)):
            end = min(start + len(some), page_bytes)
            self.page[start:end] = some[: end - start]


def dd_bytes_per_s(folder: str, load: ProbeLoad) -> tuple[float | None, float | None]:
    """What `dd` writes (to the end of an fdatasync) and reads of as many bytes, in blocks of a
    page; None where there is no `dd`, or it fails."""
    load = load.in_what_is_free(folder)
    path, nbytes = f"{folder}/dd", load.num_files * padded_bytes(load.page_bytes)
    common = [f"bs={padded_bytes(load.page_bytes)}", f"count={load.num_files}"]
    written_s = _dd("if=/dev/zero", f"of={path}", "conv=fdatasync", *common)
    if written_s is None:
        return None, None
    _forget(path)
    read_s = _dd(f"if={path}", "of=/dev/null", *common)
    os.unlink(path)
    return nbytes / written_s, nbytes / read_s if read_s is not None else None


def _dd(*args: str) -> float | None:
    started_s = time.monotonic()
    try:
        done = subprocess.run(["dd", *args], capture_output=True, check=False)
    except OSError:
        return None
    return max(1e-6, time.monotonic() - started_s) if done.returncode == 0 else None


def _forget(path: str) -> None:
    """As far as the filesystem lets us."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(fd)  # what is not written yet is not forgotten
        forget_cached(fd)
    finally:
        os.close(fd)


def _problem(error: OSError | TierError) -> str:
    if isinstance(error, OSError) and error.errno == errno.EINVAL:
        return "refused here"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
