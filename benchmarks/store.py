"""The store next to what the machine can do, in one run.

For pages of 7.3 MB and of 256 KiB, page cache warm: dump until readable on this node, and until in
files; load from files and from memory, into the slots of the node cache (where an engine's device
copy begins) and through the store API into memory of one's own. Then lookups of 1000 keys. The
limits are memcpy by one thread, and plain reads and writes of as many files by as many threads.

    python benchmarks/store.py [--rounds 7] [--mebibytes 256] [--directory DIR] [--tier s3]
        [--latency-ms 0]

With `--tier s3` the pages are objects of 4 and 8 MiB in a bucket, and the limit is what the S3
client does by itself (`s3_bench.py`); each request takes `--latency-ms` more.

Measures nothing but noise while something else runs on the machine.
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import limits
from ucm.config.settings import StoreSettings, load_settings
from ucm.store.api.shards import BlockNames, block_shape
from ucm.store.blocks import namespace
from ucm.store.blocks.blockfile import HEADER_BYTES
from ucm.store.blocks.keys import Key
from ucm.store.client.connection import NodeClient
from ucm.store.node import protocol as p
from ucm.store.pipeline import UcmPipelineStore
from ucm.store.tiers.posix import paths

PAGES: Final = {"7.3 MB": 7_340_032, "256 KiB": 256 << 10}
NUM_SETS: Final = 3
NUM_KEYS: Final = 1000
TIMEOUT_MS: Final = 60_000
FILES_AIM: Final = 0.6
LOOKUP_AIM_MS: Final = 2.0

Samples = defaultdict[str, list[float]]


class Bench:
    """A store over a node cache of its own, and a connection as a scheduler side has it."""

    def __init__(self, directory: Path, *, page_bytes: int, num_pages: int, **more: object) -> None:
        """`more` are further settings of the store; None: without one that is given here."""
        self.page_bytes = page_bytes
        self.num_pages = num_pages
        store: dict[str, object] = {
            "storage_backends": str(directory / "store"),
            # One set of blocks and a bit: of three that take turns, none is still in memory.
            "cache_buffer_capacity_gb": (1.3 * page_bytes * num_pages + (64 << 20)) / (1 << 30),
            "posix_write_queue_pages": 1_000_000,
            "node_cache_socket": str(directory / "node.sock"),
            "node_cache_idle_exit_s": 1.0,
            **more,
        }
        store = {name: value for name, value in store.items() if value is not None}
        connector = {"ucm_connector_name": "UcmPipelineStore", "ucm_connector_config": store}
        self.settings: StoreSettings = load_settings({"ucm_connectors": [connector]}).store
        config = {**store, "tensor_size_list": [page_bytes], "timeout_ms": TIMEOUT_MS}
        self.store = UcmPipelineStore(config)
        manifest = block_shape(config).manifest()
        self.manifest_json = namespace.to_json(manifest)
        self.fingerprint = namespace.fingerprint(manifest)
        self.key_of = BlockNames(self.fingerprint).key
        self._client = NodeClient.connect(
            self.settings.socket_path, session="bench", role="scheduler", timeout_s=10.0
        )
        self.pid = self._client.welcome.pid
        self._numbers = iter(range(1, 1 << 30))
        self._messages: deque[p.NodeMessage] = deque()
        self._client.send(
            p.OpenNamespace(
                ns=1,
                fingerprint=self.fingerprint,
                page_bytes=page_bytes,
                block_tokens=1,
                manifest=self.manifest_json,
            )
        )
        self._answer(p.NamespaceOpened)

    def dump(self, ids: list[bytes], source: np.ndarray) -> None:
        rows = self._addresses(source)
        self.store.wait(self.store.dump_data(ids, [0] * len(ids), rows))

    def write_prompt(self, ids: list[bytes]) -> None:
        """As an engine dumps one whose pages are in slots already, until all are in storage."""
        keys = list[bytes](map(self.key_of, ids))
        parents = [b"", *keys[:-1]]
        self._client.send(p.Reserve(id=1, ns=1, keys=keys, parents=parents))
        reply: p.ReserveReply = self._answer(p.ReserveReply)
        assert p.NO_ROOM not in reply.offsets, "the prompt is longer than the memory"
        self._client.send(p.Commit(ns=1, keys=keys, parents=parents))
        while self._num_unwritten():
            time.sleep(0.002)

    def _num_unwritten(self) -> int:
        self._client.send(p.GetStatus(id=1))
        status: p.Status = self._answer(p.Status)
        return status.queues["write_pages"]

    def load(self, ids: list[bytes], target: np.ndarray) -> None:
        rows = self._addresses(target)
        self.store.wait(self.store.load_data(ids, [0] * len(ids), rows))

    def load_into_slots(self, ids: list[bytes]) -> p.LookupReply:
        """Looks up, pinning; gives back the pins."""
        (reply,) = self.load_prompts([ids])
        return reply

    def load_prompts(self, prompts: Sequence[Sequence[bytes]]) -> list[p.LookupReply]:
        """All at once. Gives back the pins when all are there."""
        numbers = [next(self._numbers) for _ in prompts]
        for number, ids in zip(numbers, prompts, strict=True):
            keys = list[bytes](map(self.key_of, ids))
            self._client.send(
                p.Lookup(id=number, ns=1, keys=keys, read_from=0, load=True, timeout_ms=TIMEOUT_MS)
            )
        replies: list[p.LookupReply] = [self._answer(p.LookupReply) for _ in prompts]
        self._client.send(p.Release(lookups=numbers))
        return replies

    def files(self, ids: list[bytes]) -> list[str]:
        (backend,) = self.settings.storage_backends
        keys = [Key(self.key_of(block_id)) for block_id in ids]
        return [paths.block_path(backend, self.fingerprint, key) for key in keys]

    def close(self) -> None:
        """The node cache is gone when this returns."""
        self.store.close()
        self._client.send(p.Shutdown())
        deadline_s = time.monotonic() + 30
        while Path(self.settings.socket_path).exists() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        self._client.close()

    def _addresses(self, array: np.ndarray) -> np.ndarray:
        offsets = self.page_bytes * np.arange(self.num_pages, dtype=np.uint64)
        addresses: np.ndarray = offsets + np.uint64(array.ctypes.data)
        return addresses.reshape(-1, 1)

    def _answer(self, kind: type) -> Any:
        while True:
            while self._messages:
                message = self._messages.popleft()
                if isinstance(message, kind):
                    return message
            self._messages.extend(self._client.poll(1.0))


def seconds(call: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    call()
    return time.perf_counter() - started_s


def new_ids(count: int) -> list[bytes]:
    return [secrets.token_bytes(16) for _ in range(count)]


def measure_dumps(bench: Bench, source: np.ndarray, scratch: Path, taken: Samples) -> None:
    """One set of blocks that nobody has seen, and as many plain files."""
    ids = new_ids(bench.num_pages)
    visible_s = seconds(lambda: bench.dump(ids, source))
    taken["dump"].append(visible_s)
    taken["dump to files"].append(visible_s + seconds(bench.store.flush))
    scratch.mkdir()
    threads = bench.settings.write_threads
    taken["plain write"].append(
        limits.write_files_s(scratch, source, num_files=bench.num_pages, num_threads=threads)
    )
    shutil.rmtree(scratch)
    for file in bench.files(ids):
        Path(file).unlink()


def measure_loads(
    bench: Bench, sets: list[list[bytes]], target: np.ndarray, source: np.ndarray, taken: Samples
) -> None:
    """Two sets that are in files only, the first of them then from memory."""
    one, two = sets
    files, threads = bench.files(one), bench.settings.read_threads
    read_s = limits.read_files_s(files, target, skip_bytes=HEADER_BYTES, num_threads=threads)
    taken["plain read"].append(read_s)
    replies: list[p.LookupReply] = []
    taken["slots"].append(seconds(lambda: replies.append(bench.load_into_slots(one))))
    assert replies[0].from_files == len(one), f"{replies[0].from_files} of {len(one)} from files"
    target[:] = 0
    taken["memory"].append(seconds(lambda: bench.load(one, target)))
    assert np.array_equal(target, source), "not the bytes that were dumped"
    taken["memcpy"].append(limits.memcpy_s(target, source))
    taken["files"].append(seconds(lambda: bench.load(two, target)))


def measure_lookups(bench: Bench, ids: list[bytes], taken: Samples) -> None:
    bench.load_into_slots(ids)
    taken["pin"].append(seconds(lambda: bench.load_into_slots(ids)))
    taken["hit"].append(seconds(lambda: bench.store.lookup(ids)))
    missing = new_ids(len(ids))
    taken["miss"].append(seconds(lambda: bench.store.lookup(missing)))
    taken["cold prompt"].append(seconds(lambda: bench.store.lookup_on_prefix(missing)))


def measure(bench: Bench, directory: Path, *, rounds: int) -> Samples:
    taken: Samples = defaultdict(list)
    nbytes = bench.page_bytes * bench.num_pages
    source, target = limits.memory(nbytes), limits.memory(nbytes)
    source[:] = np.frombuffer(secrets.token_bytes(1 << 20), np.uint8).repeat(-(-nbytes >> 20))[
        :nbytes
    ]
    sets = [new_ids(bench.num_pages) for _ in range(NUM_SETS)]
    for ids in sets:
        bench.dump(ids, source)
    bench.store.flush()
    for i in range(rounds):
        measure_dumps(bench, source, directory / "plain", taken)
        pair = [sets[(2 * i + k) % NUM_SETS] for k in range(2)]
        measure_loads(bench, pair, target, source, taken)
    for _ in range(rounds):
        if bench.num_pages >= NUM_KEYS:
            measure_lookups(bench, sets[0][:NUM_KEYS], taken)
    return taken


SPEEDS: Final = (
    ("dump until readable on this node", "dump", "memcpy", None),
    ("dump until in files", "dump to files", "plain write", None),
    ("load from files into slots", "slots", "plain read", FILES_AIM),
    ("load from files into own memory", "files", "plain read", None),
    ("load from memory into own memory", "memory", "memcpy", None),
)
LOOKUPS: Final = (
    ("all in memory, and pinned (an engine's)", "pin", LOOKUP_AIM_MS),
    ("all in memory (store API)", "hit", LOOKUP_AIM_MS),
    ("all absent, each looked for (store API)", "miss", None),
    ("all absent, as one prompt (store API)", "cold prompt", None),
)


def verdict(good: bool | None) -> str:
    return "" if good is None else "reached" if good else "missed"


def add_rows(table: Table, name: str, taken: Samples, nbytes: int) -> None:
    for what, ours, limit, aim in SPEEDS:
        ours_s, limit_s = statistics.median(taken[ours]), statistics.median(taken[limit])
        ratio = limit_s / ours_s
        table.add_row(
            name,
            what,
            f"{nbytes / ours_s / 1e9:.2f} GB/s",
            f"{limit} {nbytes / limit_s / 1e9:.2f} GB/s",
            f"{ratio:.0%}",
            f"{aim:.0%} {verdict(ratio >= aim)}" if aim else "",
        )
    for what, kind, aim_ms in LOOKUPS if "hit" in taken else ():
        took_ms = 1000 * statistics.median(taken[kind])
        shown = f"{aim_ms:g} ms {verdict(took_ms <= aim_ms)}" if aim_ms else ""
        table.add_row(f"{NUM_KEYS} keys", f"lookup: {what}", f"{took_ms:.2f} ms", "", "", shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mebibytes", type=int, default=256, help="size of one set of blocks")
    parser.add_argument("--directory", help="where to store; a temporary directory if not given")
    parser.add_argument("--tier", choices=("posix", "s3"), default="posix")
    parser.add_argument("--latency-ms", type=int, default=0, help="of the way to the bucket")
    args = parser.parse_args()
    if args.tier == "s3":
        # Here, because its client is not installed everywhere.
        from benchmarks import s3_bench

        s3_bench.run(
            rounds=args.rounds,
            mebibytes=args.mebibytes,
            directory=args.directory,
            latency_ms=args.latency_ms,
        )
        return
    table = Table(title=f"medians of {args.rounds} rounds, {args.mebibytes} MiB each")
    for column in ("pages", "what", "here", "limit in this run", "of the limit", "aim"):
        table.add_column(column)
    for name, page_bytes in PAGES.items():
        num_pages = (args.mebibytes << 20) // page_bytes
        directory = Path(tempfile.mkdtemp(prefix="ucm-bench-", dir=args.directory))
        bench = Bench(directory, page_bytes=page_bytes, num_pages=num_pages)
        try:
            taken = measure(bench, directory, rounds=args.rounds)
        finally:
            bench.close()
            shutil.rmtree(directory, ignore_errors=True)
        add_rows(table, name, taken, page_bytes * num_pages)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
