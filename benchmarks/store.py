"""The node cache and the Posix tier next to what the machine can do, in one run.

For pages of 7.3 MB and 256 KiB: dump until every file is visible, load from files (page cache warm)
into slots, verified; load from DRAM (look up, copy out of the slots); lookups of 1000 keys that hit
and that miss. Limits measured in the same run: memcpy by one thread, and plain threaded reads and
writes of the same number of files of the same size, without a checksum.

    python benchmarks/store.py [--repeats 5] [--directory DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ucm.config import StoreSettings
from ucm.store.node import protocol as p
from ucm.store.node.client import NodeClient
from ucm.store.node.start import connect_or_start

PAGES = {"7.3 MB": (7_340_032, 27), "256 KiB": (256 << 10, 1000)}
THREADS = 8
NAMESPACE = 1
FINGERPRINT = hashlib.sha256(b"benchmarks/store.py").digest()
TIMEOUT_MS = 60_000
M = TypeVar("M")


class Session:
    """One client of a node cache of its own, and the memory that they share."""

    def __init__(self, directory: Path, page_bytes: int, num_pages: int) -> None:
        self.settings = StoreSettings(
            pipeline=("Cache", "Posix"),
            storage_backends=(str(directory / "store"),),
            # Room for little more than one prompt: of three read in turn, none is still there.
            cache_capacity_bytes=int(page_bytes * num_pages * 1.3) + (64 << 20),
            read_threads=THREADS,
            write_threads=THREADS,
            write_queue_pages=10 * num_pages,
            idle_exit_s=2.0,
            socket_path=str(directory / "node.sock"),
        )
        self.page_bytes = page_bytes
        self.client: NodeClient = connect_or_start(
            self.settings, session=f"bench-{page_bytes}", role="scheduler", timeout_s=10.0
        )
        self.memory = memoryview(
            mmap.mmap(self.client.memory_fd, self.client.welcome.capacity_bytes)
        )
        self._id = 0
        self.client.send(
            p.OpenNamespace(
                ns=NAMESPACE,
                fingerprint=FINGERPRINT,
                page_bytes=page_bytes,
                block_tokens=128,
                manifest=b"{}",
            )
        )
        self.answer(p.NamespaceOpened)

    def next_id(self) -> int:
        self._id += 1
        return self._id

    def answer(self, kind: type[M]) -> M:
        while True:
            for message in self.client.poll(1.0):
                if isinstance(message, kind):
                    return message

    def dump(self, keys: list[bytes], page: bytes) -> None:
        """Dumps, and waits until every file has its name."""
        parents = [b"", *keys[:-1]]
        self.client.send(p.Reserve(id=self.next_id(), ns=NAMESPACE, keys=keys, parents=parents))
        for offset in self.answer(p.ReserveReply).offsets:
            assert offset >= 0, "no slot"
            self.memory[offset : offset + self.page_bytes] = page
        self.client.send(p.Commit(ns=NAMESPACE, keys=keys, parents=parents))
        self.settle()

    def settle(self) -> None:
        while True:
            self.client.send(p.GetStatus(id=self.next_id()))
            if not any(self.answer(p.Status).queues.values()):
                return
            time.sleep(0.002)

    def load(self, keys: list[bytes], *, into: memoryview | None = None) -> p.LookupReply:
        """Brings pages into slots; copies them out if told to; gives back the pins."""
        lookup_id = self.next_id()
        self.client.send(
            p.Lookup(
                id=lookup_id, ns=NAMESPACE, keys=keys, read_from=0, load=True, timeout_ms=TIMEOUT_MS
            )
        )
        reply = self.answer(p.LookupReply)
        if into is not None:
            size = self.page_bytes
            for i, offset in enumerate(reply.offsets):
                into[i * size : (i + 1) * size] = self.memory[offset : offset + size]
        self.client.send(p.Release(lookups=[lookup_id]))
        return reply

    def close(self) -> None:
        self.client.send(p.Shutdown())
        time.sleep(0.1)
        self.client.close()


def keys_of(name: str, count: int) -> list[bytes]:
    return [hashlib.sha256(f"{name}/{i}".encode()).digest() for i in range(count)]


def seconds(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def plain_files(folder: Path, page: bytes, target: memoryview, count: int) -> tuple[float, float]:
    """Seconds to write and to read `count` files of one page with the same number of threads."""
    folder.mkdir()

    def write(i: int) -> None:
        fd = os.open(folder / str(i), os.O_WRONLY | os.O_CREAT)
        os.pwrite(fd, page, 0)
        os.close(fd)

    def read(i: int) -> None:
        fd = os.open(folder / str(i), os.O_RDONLY)
        os.preadv(fd, [target[i * len(page) : (i + 1) * len(page)]], 0)
        os.close(fd)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, []))
        write_s = seconds(lambda: list(pool.map(write, range(count))))
        read_s = seconds(lambda: list(pool.map(read, range(count))))
    shutil.rmtree(folder)
    return write_s, read_s


def measure(name: str, directory: Path, repeats: int, table: Table) -> None:
    page_bytes, count = PAGES[name]
    page = os.urandom(page_bytes)
    target = memoryview(mmap.mmap(-1, page_bytes * count))
    target[:] = bytes(len(target))
    source = memoryview(mmap.mmap(-1, page_bytes * count))
    source[:] = bytes(len(source))
    session = Session(directory, page_bytes, count)
    prompts = [keys_of(f"{name}-{i}", count) for i in range(3)]
    taken: dict[str, list[float]] = {}

    def note(what: str, taken_s: float) -> None:
        taken.setdefault(what, []).append(taken_s)

    for prompt in prompts:
        note("dump", seconds(partial(session.dump, prompt, page)))
    for repeat in range(repeats):
        prompt = prompts[repeat % 3]
        started_s = time.perf_counter()
        reply = session.load(prompt)
        note("files", time.perf_counter() - started_s)
        assert reply.from_files == count, f"{reply.from_files} of {count} from files"
        note("dram", seconds(partial(session.load, prompt, into=target)))
        write_s, read_s = plain_files(directory / "plain", page, target, count)
        note("plain write", write_s)
        note("plain read", read_s)
        note("memcpy", seconds(partial(target.__setitem__, slice(None), source)))
        if count == 1000:
            missing = keys_of(f"missing-{repeat}", 1000)
            note("1000 hits", seconds(partial(session.load, prompt)))
            note("1000 misses", seconds(partial(session.load, missing)))
    session.close()
    gigabytes = page_bytes * count / 1e9
    for what, limit in (("dump", "plain write"), ("files", "plain read"), ("dram", "memcpy")):
        ours, theirs = statistics.median(taken[what]), statistics.median(taken[limit])
        table.add_row(
            name,
            {"dump": "dump until visible", "files": "load from files", "dram": "load from DRAM"}[
                what
            ],
            f"{gigabytes / ours:.2f} GB/s",
            f"{limit} {gigabytes / theirs:.2f} GB/s",
            f"{theirs / ours:.0%}",
        )
    for what in ("1000 hits", "1000 misses"):
        if what in taken:
            table.add_row(
                name, f"lookup, {what}", f"{statistics.median(taken[what]) * 1000:.2f} ms", "", ""
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--directory", help="where to store; a temporary directory if not given")
    args = parser.parse_args()
    table = Table(title=f"node cache and files, {THREADS} threads, medians of {args.repeats}")
    for column in ("page", "what", "UCM", "limit in this run", "of the limit"):
        table.add_column(column)
    for name in PAGES:
        directory = Path(tempfile.mkdtemp(prefix="ucm-bench-", dir=args.directory))
        try:
            measure(name, directory, args.repeats, table)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    Console().print(table)


if __name__ == "__main__":
    main()
