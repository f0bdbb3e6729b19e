"""What a node of a cluster does for the tests: `python -m tests.cluster.agent`.

It reads questions, one JSON object a line, and answers each with one. A node may be another kernel,
or stand in a namespace of its own, so this and the store are all that it shares with who asks.
Times are `time.time()`: the nodes of one cluster have one clock.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import patch

from tests.store.node.support import (
    FINGERPRINT,
    PAGE_BYTES,
    Engine,
    content,
    engine,
    kill,
    make_keys,
)
from ucm.config.settings import StoreSettings
from ucm.errors import TierError
from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.node import protocol as p
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.backend import Backend
from ucm.store.tiers.posix.sweep import Sweep
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import ReadStatus, TierNamespace

NAMESPACE = TierNamespace(FINGERPRINT, PAGE_BYTES, b"{}")
_open: dict[str, Engine] = {}
_tiers: dict[str, PosixTier] = {}


def run(command: str, timeout_s: float = 30.0) -> dict[str, Any]:
    with subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return {"status": process.returncode, "output": output}


def start(store: str, socket: str, **changes: Any) -> None:
    """A node cache, and an engine of it."""
    fields: dict[str, Any] = {
        "storage_backends": (store,),
        "cache_capacity_bytes": 32 << 20,
        "idle_exit_s": 60.0,
        "min_free_gb": 0.0,
        "socket_path": socket,
        "io_timeout_ms": 5_000,
        "recheck_s": 1.0,
    }
    _open[store] = engine(StoreSettings(**{**fields, **changes}))


def stop(store: str) -> None:
    """The node cache, and with it all that it has in memory."""
    one = _open.pop(store, None)
    if one is not None:
        one.close()
        with suppress(ProcessLookupError):
            kill(one.pid)


def dump(store: str, name: str, count: int) -> dict[str, int]:
    """Prompts of one block each, as engines compute them, and whether storage has them."""
    one = _open[store]
    keys = make_keys(name, count)
    before = _unwritten(one.status())
    for key in keys:
        assert one.dump([key])[0] >= 0
    return {"not_written": _unwritten(one.wait_written()) - before}


def _unwritten(status: p.Status) -> int:
    names = ("write_failed_", "dump_dropped_")
    return sum(number for name, number in status.counters.items() if name.startswith(names))


def load(store: str, name: str, count: int) -> int:
    """How many of these prompts can be loaded. Their bytes are checked."""
    one = _open[store]
    return sum(one.load([key])[0] for key in make_keys(name, count))


def publish_untouched(store: str, name: str, count: int, pause_s: float) -> list[float]:
    """As a writer that ends before it touches a page's directory, or that may not."""
    with patch.object(Backend, "changed"):
        return publish(store, name, count, pause_s)


def publish(store: str, name: str, count: int, pause_s: float = 0.0) -> list[float]:
    """Pages, straight into storage. Returns when each was there."""
    tier = _tier(store)
    tier.open_namespace(NAMESPACE)
    page = memoryview(mmap.mmap(-1, padded_bytes(PAGE_BYTES)))
    times_s = []
    for key in make_keys(name, count):
        page[:PAGE_BYTES] = content(key)
        time.sleep(pause_s)
        staged = tier.stage(NAMESPACE, key, page, num_tokens=128)
        assert staged is not None
        tier.publish(staged)
        times_s.append(time.time())
    return times_s


def wait_promised(
    store: str, name: str, count: int, at_once: int, timeout_ms: int
) -> list[float | None]:
    """A hand-off of each of these pages, some at once. Returns when each was here."""
    one = _open[store]
    times_s: list[float | None] = [None] * count
    waiting: dict[int, int] = {}
    left = list(enumerate(make_keys(name, count)))
    while left or waiting:
        while left and len(waiting) < at_once:
            i, key = left.pop(0)
            waiting[one.ask([key], timeout_ms=timeout_ms, promised=1)] = i
        reply = one.answer(p.LookupReply)
        times_s[waiting.pop(reply.id)] = time.time() if reply.offsets else None
        one.client.send(p.Release(lookups=[reply.id]))
    return times_s


def wait_ordinary(
    store: str, name: str, count: int, timeout_s: float, pause_s: float
) -> list[float | None]:
    """Asks for each of these pages again and again. Returns when each was here."""
    one = _open[store]
    found_s: dict[Key, float] = {}
    keys = make_keys(name, count)
    deadline_s = time.monotonic() + timeout_s
    while len(found_s) < count and time.monotonic() < deadline_s:
        for key in keys:
            if key not in found_s and one.load([key])[0]:
                found_s[key] = time.time()
        time.sleep(pause_s)
    return [found_s.get(key) for key in keys]


def wait_in_storage(
    store: str, name: str, count: int, at_once: int, timeout_s: float
) -> list[float | None]:
    """Asks storage for the first of these pages that are not there yet, as fast as it answers, and
    never doubts what it says. Returns when each was there."""
    tier, keys = _tier(store), make_keys(name, count)
    found_s: dict[Key, float] = {}
    deadline_s = time.monotonic() + timeout_s
    while len(found_s) < count and time.monotonic() < deadline_s:
        for key in [key for key in keys if key not in found_s][:at_once]:
            if tier.contains_now(NAMESPACE, key):
                found_s[key] = time.time()
    return [found_s.get(key) for key in keys]


def status(store: str) -> dict[str, Any]:
    found = _open[store].status()
    return {"counters": dict(found.counters), "invariant": found.invariant}


def replace(store: str, name: str, count: int, within_s: float) -> None:
    """Removes pages and publishes them again, over and over."""
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        remove(store, name, count)
        publish(store, name, count)


def remove(store: str, name: str, count: int) -> None:
    for path in paths_of(store, name, count):
        os.unlink(path)


def paths_of(store: str, name: str, count: int) -> list[str]:
    return [paths.block_path(store, FINGERPRINT, key) for key in make_keys(name, count)]


def sweep_beside_open_pages(store: str, name: str, count: int) -> dict[str, Any]:
    """Removes pages that are open here, one of them from the quarantine, sweeps, and lists what is
    left of them."""
    of_pages = paths_of(store, name, count)
    aside = Path(paths.quarantine_path(store, FINGERPRINT, make_keys(name, 1)[0]))
    aside.parent.mkdir(parents=True)
    os.rename(of_pages[0], aside)
    of_pages[0] = str(aside)
    opened = [os.open(path, os.O_RDONLY) for path in of_pages]
    try:
        for path in of_pages:
            os.unlink(path)
        time.sleep(0.1)
        sweep = Sweep(store, stale_s=0.0, dirs_per_s=1e4, stop=Event(), empty_s=0.01)
        sweep.quarantine_s = 0.01
        swept = sweep.run()
        left = [each.name for each in Path(store).rglob("*") if each.is_file()]
    finally:
        for fd in opened:
            os.close(fd)
    assert swept is not None
    return {"left": left, "problem": swept.problem, "num_files": swept.num_files}


def look(store: str, name: str, count: int) -> dict[str, Any]:
    """What a tier that is asked directly says of pages, and how long the slowest answer took."""
    tier, page = _tier(store), memoryview(mmap.mmap(-1, padded_bytes(PAGE_BYTES)))
    said: list[str] = []
    slowest_s = 0.0
    for key in make_keys(name, count):
        began_s = time.monotonic()
        try:
            read = tier.read(NAMESPACE, key, page)
            said.append(read.status.name)
            assert read.status is not ReadStatus.HIT or page[:PAGE_BYTES] == content(key)
        except TierError as error:
            said.append(str(error))
        slowest_s = max(slowest_s, time.monotonic() - began_s)
    return {"said": said, "slowest_s": slowest_s}


def _tier(store: str) -> PosixTier:
    if store not in _tiers:
        _tiers[store] = PosixTier([store])
    return _tiers[store]


_OPS: tuple[Callable[..., Any], ...] = (
    *(run, start, stop, dump, load, publish, wait_promised, wait_ordinary, wait_in_storage),
    *(publish_untouched, status, replace, remove, sweep_beside_open_pages, look),
)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    ops = {op.__name__: op for op in _OPS}
    # What is sent to a console that nobody has open yet is lost.
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            answer = {"result": ops[question.pop("op")](**question)}
        except BaseException:  # noqa: BLE001 (told to who has asked)
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
