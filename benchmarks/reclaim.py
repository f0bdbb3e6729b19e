"""Reclaim of a store with very many files: what a deletion costs, and what lookups feel of it.

Makes a store of small files (`--files`), then
* lets a node cache without a limit answer lookups of 16 blocks that are there, for some seconds;
* does the same with a node cache whose limit the store exceeds, while it reclaims;
* reclaims once more in a process of its own under strace, which counts the system calls.

    python benchmarks/reclaim.py [--files 1000000] [--seconds 20] [--directory DIR]

Measures nothing but noise while something else runs on the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ucm.config.settings import StoreSettings
from ucm.store.blocks.keys import Key
from ucm.store.client.connection import NodeClient
from ucm.store.client.start import connect_or_start
from ucm.store.node import protocol as p
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.reclaim_plan import WHOLE, want_of
from ucm.store.tiers.posix.reclaim_record_files import ReclaimRecorder
from ucm.store.tiers.posix.reclaim_run import ReclaimRun
from ucm.store.tiers.posix.rights import UMASK_DECIDES
from ucm.store.tiers.posix.stored_count import count_stored

FINGERPRINT: Final = hashlib.sha256(b"reclaim benchmark").digest()
FILE_BYTES: Final = 4096
SHARE: Final = 0.1
LOOKUP_BLOCKS: Final = 16
NUM_USED: Final = 4096
GIB: Final = 1 << 30
HOUR_S: Final = 3600


def key(number: int) -> Key:
    return Key(hashlib.sha256(b"%d" % number).digest())


def make_store(store: Path, num_files: int) -> None:
    """Files of one block each, all an hour old."""
    content = bytes(FILE_BYTES)
    made: set[str] = set()
    old_s = time.time() - HOUR_S
    for number in range(num_files):
        path = paths.block_path(str(store), FINGERPRINT, key(number))
        directory = os.path.dirname(path)
        if directory not in made:
            os.makedirs(directory, exist_ok=True)
            made.add(directory)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(fd, content)
        # The last are those that were used last, and stay.
        os.utime(fd, (old_s + number / num_files, old_s + number / num_files))
        os.close(fd)
    manifest = Path(paths.manifest_path(str(store), FINGERPRINT))
    manifest.write_bytes(b"{}")


class Node:
    """A node cache of its own, and a connection as a scheduler side has it."""

    def __init__(self, directory: Path, name: str, capacity_gb: float) -> None:
        settings = StoreSettings(
            storage_backends=(str(directory / "store"),),
            cache_capacity_bytes=64 << 20,
            min_free_gb=0.0,
            capacity_gb=capacity_gb,
            gc_grace_s=0.0,
            gc_check_interval_s=3600.0,
            gc_heartbeat_s=1.0,
            sweep_dirs_per_s=1,
            # Every lookup asks storage.
            recheck_s=0.0,
            socket_path=str(directory / f"{name}.sock"),
        )
        self.client: NodeClient = connect_or_start(
            settings, session="bench/0", role="scheduler", timeout_s=60
        )
        self._send(
            p.OpenNamespace(
                ns=1, fingerprint=FINGERPRINT, page_bytes=1, block_tokens=16, manifest=b"{}"
            ),
            p.NamespaceOpened,
        )

    def _send(self, message: p.ClientMessage, answer: type) -> p.NodeMessage:
        self.client.send(message)
        while True:
            for each in self.client.poll(60):
                if isinstance(each, answer):
                    return each

    def look_up(self, number: int, keys: Sequence[Key]) -> float:
        """Returns how long it took, in seconds."""
        message = p.Lookup(
            id=number, ns=1, keys=list(keys), read_from=0, load=False, timeout_ms=60_000
        )
        started_s = time.perf_counter()
        reply = self._send(message, p.LookupReply)
        took_s = time.perf_counter() - started_s
        assert isinstance(reply, p.LookupReply) and reply.num_stored == len(keys), reply
        return took_s

    def counter(self, name: str) -> int:
        status = self._send(p.GetStatus(id=1), p.Status)
        assert isinstance(status, p.Status)
        return status.counters.get(name, 0)

    def close(self) -> None:
        self.client.send(p.Shutdown())
        self.client.close()


def latencies_s(node: Node, num_files: int, *, seconds: float, wants_reclaim: bool) -> list[float]:
    """Of lookups of blocks that nothing reclaims, and only while it does if that is wanted."""
    took: list[float] = []
    number, ends_s = 0, time.monotonic() + seconds
    while time.monotonic() < ends_s:
        for _ in range(200):
            number += 1
            first = num_files - NUM_USED + number * LOOKUP_BLOCKS % (NUM_USED - LOOKUP_BLOCKS)
            took.append(node.look_up(number, [key(first + i) for i in range(LOOKUP_BLOCKS)]))
        if wants_reclaim and node.counter("reclaimed_files_capacity"):
            break
    return took


def show(name: str, took_s: Sequence[float]) -> None:
    cuts = statistics.quantiles(took_s, n=100)
    print(
        f"{name}: {len(took_s)} lookups, median {cuts[49] * 1e3:.3f} ms, "
        f"95% {cuts[94] * 1e3:.3f} ms, 99% {cuts[98] * 1e3:.3f} ms"
    )


def run_once(store: Path) -> None:
    """In this process: counts, then frees a tenth."""
    root = os.open(store, os.O_RDONLY)
    started_s = time.monotonic()
    count = count_stored(root, time.time_ns, lambda: None)
    counted_s = time.monotonic() - started_s
    used_bytes = count.nbytes[WHOLE]
    want = want_of(used_bytes=used_bytes, limit_bytes=used_bytes, trigger=0.9, share=SHARE)
    assert want is not None
    recorder = ReclaimRecorder(UMASK_DECIDES)
    run = ReclaimRun(str(store), 0.0, time.time_ns, lambda keys, freed: None, recorder)
    done = run.run(root, {WHOLE: want})
    num_files = done.files.total()
    print(
        f"counted: {count.num_files} files within {count.error:.2%}, in {counted_s:.2f} s\n"
        f"one run: {num_files} files in {done.seconds:.2f} s, "
        f"{done.seconds / num_files * 1e6:.0f} us each"
    )


def count_calls(store: Path) -> None:
    command = [sys.executable, __file__, "--once", str(store)]
    done = subprocess.run(
        ["strace", "-c", "-f", *command], capture_output=True, text=True, check=True
    )
    print("under strace:", done.stdout.strip().replace("\n", "; "))
    calls = {
        fields[-1]: int(fields[3])
        for line in done.stderr.splitlines()
        if (fields := line.split()) and re.fullmatch(r"[\d.]+", fields[0]) and len(fields) > 4
    }
    calls.pop("total", None)
    deleted = calls["unlinkat"]
    of_files = (
        "openat",
        "close",
        "getdents64",
        "newfstatat",
        "fstat",
        "lseek",
        "fcntl",
        "unlinkat",
    )
    each = {name: calls.get(name, 0) / deleted for name in of_files}
    print(
        f"system calls per deletion, counting included: {sum(each.values()):.1f} ("
        + ", ".join(f"{name} {number:.2f}" for name, number in each.items() if number >= 0.01)
        + ")"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once is not None:
        run_once(arguments.once)
        return
    directory = Path(tempfile.mkdtemp(prefix="ucm-", dir=arguments.directory))
    try:
        measure(directory, arguments.files, arguments.seconds)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def measure(directory: Path, num_files: int, seconds: float) -> None:
    started_s = time.monotonic()
    make_store(directory / "store", num_files)
    print(f"{num_files} files made in {time.monotonic() - started_s:.0f} s", flush=True)
    quiet = Node(directory, "quiet", 0.0)
    latencies_s(quiet, num_files, seconds=2, wants_reclaim=False)
    show("without reclaim", latencies_s(quiet, num_files, seconds=seconds, wants_reclaim=False))
    quiet.close()
    # It begins with its first beat, a second later.
    busy = Node(directory, "busy", num_files * FILE_BYTES / GIB / 0.75)
    latencies_s(busy, num_files, seconds=2, wants_reclaim=False)
    show("while it reclaims", latencies_s(busy, num_files, seconds=600, wants_reclaim=True))
    show("and afterwards", latencies_s(busy, num_files, seconds=seconds, wants_reclaim=False))
    num_gone = busy.counter("reclaimed_files_capacity")
    took_s = busy.counter("reclaim_us") / 1e6
    print(
        f"it reclaimed {num_gone} files in {took_s:.1f} s, with lookups beside it and as much rest "
        f"as work: {took_s / max(1, num_gone) * 1e6:.0f} us each"
    )
    busy.close()
    run_once(directory / "store")
    if shutil.which("strace"):
        count_calls(directory / "store")


if __name__ == "__main__":
    main()
