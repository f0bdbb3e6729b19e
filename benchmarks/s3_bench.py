"""Pages in a bucket next to what the S3 client does by itself, in one run (`store.py --tier s3`).

The server is SeaweedFS on this machine, which takes most of its time: what counts are the ratios,
and the CPU time of a page on the client's side. Bare is one PUT of bytes that lie there in one
piece, and one GET, by as many threads; a page is looked for before it is written, hashed when it is
written and when it is read, and then lies in memory of the reader's.
"""

from __future__ import annotations

import mmap
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import obstore
import psutil
from obstore.store import S3Store
from rich.console import Console
from rich.table import Table

from benchmarks.store import NUM_SETS, Bench, new_ids
from examples.cluster.processes import end_run, free_port
from examples.cluster.seaweedfs import CREDENTIALS, SeaweedFS
from ucm.store.blocks.blockfile import HEADER_BYTES
from ucm.store.blocks.keys import Key
from ucm.store.tiers.s3.breaker import BucketBreaker
from ucm.store.tiers.s3.bucket import Bucket, BucketPlace
from ucm.store.tiers.s3.tier import S3Tier
from ucm.store.tiers.tier import ReadStatus, TierNamespace

PAGES: Final = {"4 MiB": 4 << 20, "8 MiB": 8 << 20}
BUCKET: Final = "bench"
REGION: Final = "us-east-1"
AIM: Final = 0.8
NUM_PROMPTS: Final = 4

# Seconds a page took, and seconds of CPU, by what was done.
Taken = defaultdict[str, list[tuple[float, float]]]


class Bare:
    """The S3 client with the settings that the tier gives it."""

    def __init__(self, url: str, page: memoryview) -> None:
        self._client = S3Store(
            BUCKET,
            endpoint=url,
            region=REGION,
            virtual_hosted_style_request=False,
            unsigned_payload=True,
            client_options={"allow_http": True},
        )
        self._whole = bytes(HEADER_BYTES) + bytes(page)

    def put(self, i: int) -> None:
        obstore.put(self._client, f"bare/{i}", self._whole, use_multipart=False)

    def get(self, i: int) -> None:
        assert len(memoryview(obstore.get(self._client, f"bare/{i}").bytes())) == len(self._whole)


class Pages:
    """The tier, each thread's page in memory of its own."""

    def __init__(self, url: str, page: memoryview) -> None:
        place = BucketPlace(BUCKET, REGION, endpoint=url)
        self._tier = S3Tier(Bucket(place, BucketBreaker(1.0)), place="bench")
        self._namespace = TierNamespace(secrets.token_bytes(32), len(page), b"{}")
        self._page = page
        self.new_keys(0)

    def new_keys(self, count: int) -> None:
        self._keys = [Key(secrets.token_bytes(32)) for _ in range(count)]
        self._targets = [memoryview(mmap.mmap(-1, len(self._page))) for _ in range(count)]
        for target in self._targets:
            target[:] = bytes(len(target))

    def put(self, i: int) -> None:
        staged = self._tier.stage(self._namespace, self._keys[i], self._page, num_tokens=128)
        assert staged is not None
        self._tier.publish(staged)

    def get(self, i: int) -> None:
        read = self._tier.read(self._namespace, self._keys[i], self._targets[i])
        assert read.status is ReadStatus.HIT


def timed(
    taken: Taken, what: str, count: int, work: Callable[[], object], pid: int | None = None
) -> None:
    """`pid`: of the process that does it, if not this one."""
    cpu_s = _cpu_s(pid)
    began_s = time.perf_counter()
    work()
    took_s = time.perf_counter() - began_s
    taken[what].append((took_s / count, (_cpu_s(pid) - cpu_s) / count))


def _cpu_s(pid: int | None) -> float:
    if pid is None:
        return time.process_time()
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def measure_tier(taken: Taken, bare: Bare, pages: Pages, count: int, threads: int) -> None:
    """As many pages at once as there are threads, in turns: what else is going on meets both."""
    pages.new_keys(count)
    with ThreadPoolExecutor(threads) as pool:
        for what in ("put", "get"):
            for i in range(0, count - threads + 1, threads):
                for name, each in (("bare", bare), ("tier", pages)):
                    call = partial(pool.map, getattr(each, what), range(i, i + threads))
                    timed(taken, f"{name} {what} {threads}", threads, lambda c=call: list(c()))


class Node:
    """A node cache over the bucket. Of the sets that take turns none is still in memory."""

    def __init__(self, url: str, directory: Path, page_bytes: int, count: int) -> None:
        self.bench = Bench(
            directory,
            page_bytes=page_bytes,
            num_pages=count,
            store_pipeline="Cache|S3",
            storage_backends=None,
            # Less than two sets.
            cache_buffer_capacity_gb=1.3 * page_bytes * count / (1 << 30),
            s3_bucket=BUCKET,
            s3_endpoint=url,
        )
        self._source = np.frombuffer(os.urandom(page_bytes), np.uint8)
        self._source = np.tile(self._source, count)
        self._sets = [new_ids(count) for _ in range(NUM_SETS)]
        for ids in self._sets:
            self.bench.dump(ids, self._source)
        self.bench.store.flush()
        self._pid = self.bench.pid
        self._turn = 0

    def measure(self, taken: Taken, bare: Bare, count: int) -> None:
        reads, writes = self.bench.settings.read_threads, self.bench.settings.write_threads
        for what, name, threads in (
            ("put", "put", writes),
            ("put", "put prompt", writes),
            ("get", "get", reads),
            ("get", "get prompts", reads),
        ):
            with ThreadPoolExecutor(threads) as pool:
                call = partial(pool.map, getattr(bare, what), range(count))
                timed(taken, f"bare {name} node", count, lambda c=call: list(c()))
            work = getattr(self, name.replace(" ", "_"))
            timed(taken, f"node {name}", count, work, self._pid)

    def put(self) -> None:
        """Until the bucket has all."""
        self.bench.dump(new_ids(self.bench.num_pages), self._source)
        self.bench.store.flush()

    def put_prompt(self) -> None:
        """As many, of one prompt: in its order."""
        self.bench.write_prompt(new_ids(self.bench.num_pages))

    def get(self) -> None:
        """Into slots, where an engine's device copy begins."""
        self._get(1)

    def get_prompts(self) -> None:
        """As many pages, of several prompts at once."""
        self._get(NUM_PROMPTS)

    def _get(self, num_prompts: int) -> None:
        self._turn += 1
        ids = self._sets[self._turn % NUM_SETS]
        size = -(-len(ids) // num_prompts)
        replies = self.bench.load_prompts([ids[i : i + size] for i in range(0, len(ids), size)])
        num_read = sum(reply.from_files for reply in replies)
        assert num_read == len(ids), f"{num_read} of {len(ids)} from the bucket"


ROWS: Final = (
    ("PUT, tier, 1 thread", "tier put 1", "bare put 1"),
    ("GET, tier, 1 thread", "tier get 1", "bare get 1"),
    ("PUT, tier, 4 threads", "tier put 4", "bare put 4"),
    ("GET, tier, 4 threads", "tier get 4", "bare get 4"),
    ("PUT, node cache (dump until there)", "node put", "bare put node"),
    ("PUT, node cache, one prompt", "node put prompt", "bare put prompt node"),
    ("GET, node cache (into slots)", "node get", "bare get node"),
    (f"GET, node cache, {NUM_PROMPTS} prompts", "node get prompts", "bare get prompts node"),
)


def add_rows(table: Table, name: str, taken: Taken, page_bytes: int) -> None:
    for what, ours, bare in ROWS:
        (our_s, our_cpu_s), (bare_s, bare_cpu_s) = median(taken[ours]), median(taken[bare])
        # Of neighbours: what else the machine does comes and goes.
        ratio = statistics.median(
            b[0] / o[0] for o, b in zip(taken[ours], taken[bare], strict=True)
        )
        table.add_row(
            name,
            what,
            f"{page_bytes / our_s / (1 << 20):.0f} MiB/s",
            f"{page_bytes / bare_s / (1 << 20):.0f} MiB/s",
            f"{ratio:.0%}",
            "reached" if ratio >= AIM else "missed",
            f"{1000 * our_cpu_s:.1f} ms",
            f"{1000 * bare_cpu_s:.1f} ms",
        )


def median(taken: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(t[0] for t in taken), statistics.median(t[1] for t in taken)


@contextmanager
def slow_way(url: str, latency_ms: int) -> Iterator[str]:
    """The URL of the server behind it."""
    if not latency_ms:
        yield url
        return
    port = free_port()
    arguments = [str(port), url.rpartition(":")[2], str(latency_ms)]
    command = [sys.executable, "-m", "benchmarks.latency", *arguments]
    proxy = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    try:
        while not _listens(port):
            assert proxy.poll() is None, "the proxy has ended"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        proxy.kill()
        proxy.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def bucket(directory: str | None, *, latency_ms: int = 0) -> Iterator[tuple[str, Path]]:
    folder = Path(tempfile.mkdtemp(prefix="ucm-bench-", dir=directory))
    os.environ.update(CREDENTIALS)
    try:
        with SeaweedFS(folder / "server", bucket=BUCKET) as server:
            server.wait_ready()
            server.make_bucket()
            with slow_way(server.url, latency_ms) as url:
                yield url, folder
    finally:
        end_run()
        shutil.rmtree(folder, ignore_errors=True)


def run(*, rounds: int, mebibytes: int, directory: str | None, latency_ms: int) -> None:
    way = f", {latency_ms} ms away" if latency_ms else ""
    title = f"S3 (SeaweedFS here{way}): medians of {rounds} rounds, {mebibytes} MiB each"
    table = Table(title=title)
    for column in (
        "pages",
        "what",
        "here",
        "bare",
        "of bare",
        f"aim {AIM:.0%}",
        "CPU/page",
        "bare",
    ):
        table.add_column(column)
    with bucket(directory, latency_ms=latency_ms) as (url, folder):
        for name, page_bytes in PAGES.items():
            count = (mebibytes << 20) // page_bytes
            page = memoryview(mmap.mmap(-1, page_bytes))
            page[:] = os.urandom(page_bytes)
            bare, pages = Bare(url, page), Pages(url, page)
            node = Node(url, folder / str(page_bytes), page_bytes, count)
            taken: Taken = defaultdict(list)
            try:
                for _ in range(rounds):
                    for threads in (1, 4):
                        measure_tier(taken, bare, pages, count, threads)
                    node.measure(taken, bare, count)
            finally:
                node.bench.close()
            add_rows(table, name, taken, page_bytes)
    Console(width=140).print(table)
