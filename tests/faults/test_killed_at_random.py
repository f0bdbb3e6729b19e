"""kill -9 of node caches, their clients and reclaim, at any instant: whole files, right reads."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import pytest

from tests.cli.parts import ucm
from tests.faults.storm_client import NUM_BLOCKS, NUM_PROMPTS, prompt
from tests.store.api.whole_store import SIZES, dump, load, rows
from tests.store.conftest import place as place
from tests.store.node.support import ROOT, Place, kill, wait_until
from ucm.errors import TaskFailed, UcmError
from ucm.store.client.connection import NodeClient
from ucm.store.inspect.reclaim_now import ReclaimedNow
from ucm.store.inspect.verified import Verified
from ucm.store.node import protocol as p
from ucm.store.pipeline import UcmPipelineStore
from ucm.store.tiers.posix import paths

PAGE_FILE_BYTES = 16384
# Less than is written: something is reclaimed all the time.
LIMITED = {
    "posix_capacity_gb": NUM_PROMPTS * NUM_BLOCKS * PAGE_FILE_BYTES / 2 / (1 << 30),
    "posix_gc_grace_sec": 0,
    "posix_gc_check_interval_sec": 0.5,
    "posix_gc_heartbeat_interval_sec": 0.2,
    "posix_gc_stale_threshold_sec": 2,
    "posix_write_queue_pages": 16,
}
# Two nodes, and two clients on each.
NODES = ("a", "b")
CLIENTS_PER_NODE = 2
LONGEST_PAUSE_S = 0.3


def config_of(place: Place, node: str, limits: Mapping[str, float]) -> dict[str, Any]:
    """Memory for a quarter of the prompts, so that most of what is read comes from files."""
    return {
        "store_pipeline": "Cache|Posix",
        "storage_backends": str(place.store),
        "cache_buffer_capacity_gb": NUM_PROMPTS * NUM_BLOCKS * PAGE_FILE_BYTES / 4 / (1 << 30),
        "min_free_gb": 0,
        "node_cache_socket": place.settings(node).socket_path,
        "node_cache_idle_exit_s": 60,
        "tensor_size_list": list(SIZES),
        "timeout_ms": 10_000,
        **limits,
    }


class Clients:
    """Processes, each started anew when it was killed."""

    def __init__(self, place: Place, limits: Mapping[str, float]) -> None:
        self._place = place
        self._limits = limits
        self._num_started = 0
        self.running: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._answers = open(place.directory / "answers", "wb")  # noqa: SIM115 - closed in end()

    def start(self, node: str) -> None:
        self._num_started += 1
        config = json.dumps(config_of(self._place, node, self._limits))
        command = [sys.executable, "-m", "tests.faults.storm_client", config]
        process = subprocess.Popen(
            [*command, str(self._num_started)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=self._answers,
        )
        self.running.append((node, process))

    def kill(self, index: int) -> None:
        node, process = self.running.pop(index)
        assert process.poll() is None, f"a client has ended with {process.returncode}"
        process.kill()
        process.communicate()
        self.start(node)

    def end(self) -> None:
        for _, process in self.running:
            process.communicate()
            assert process.returncode == 0, "a client has read wrong bytes"

    def num_answered(self) -> int:
        return (self._place.directory / "answers").read_bytes().count(b"answered")

    def close(self) -> None:
        self._answers.close()
        for _, process in self.running:
            process.kill()
            # Closes its pipe too, which would be held against another test.
            process.communicate()


@contextmanager
def clients(place: Place, limits: Mapping[str, float]) -> Iterator[Clients]:
    started = Clients(place, limits)
    try:
        for node in NODES * CLIENTS_PER_NODE:
            started.start(node)
        yield started
    finally:
        started.close()


def node_cache_pids(place: Place) -> list[int]:
    """Not the clients, which have the same folder on their command lines."""

    def is_node_cache(pid: int) -> bool:
        with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"ucm.store.node" in file.read().split(b"\0")
        return False

    return [pid for pid in place.pids() if is_node_cache(pid)]


def serving(place: Place) -> list[p.Status]:
    """What the node caches say that answer now."""
    found = []
    for node in NODES:
        path = place.settings(node).socket_path
        with suppress(UcmError):
            client = NodeClient.connect(path, session="watch", role="tool", timeout_s=1.0)
            with client:
                client.send(p.GetStatus(id=1))
                found += [m for m in client.poll(1.0) if isinstance(m, p.Status)]
    return found


class Commands:
    """Of `ucm reclaim`, two at a time: who finds the other one at it says so, and ends."""

    NUM = 2

    def __init__(self, place: Place, rng: random.Random) -> None:
        self._place = place
        self._rng = rng
        self._running: list[subprocess.Popen[str]] = []

    def arguments(self) -> list[str]:
        files = self._rng.randint(1, NUM_PROMPTS)
        free_gb = f"{files * PAGE_FILE_BYTES / (1 << 30):.9f}"
        return ["reclaim", "--free-gb", free_gb, "--grace-s", "0", "--json", str(self._place.store)]

    def has_lease(self) -> bool:
        with suppress(OSError, ValueError):
            note = json.loads((self._place.store / paths.RECLAIM_LEASE).read_bytes())
            return any(each.pid == note["pid"] for each in self._running)
        return False

    def kill(self) -> None:
        """One of them, mostly while it deletes."""
        while len(self._running) < self.NUM:
            command = [sys.executable, "-m", "ucm.cli.main", *self.arguments()]
            pipe = subprocess.PIPE
            self._running.append(
                subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
            )
        deadline_s = time.monotonic() + self._rng.uniform(0.3, 3.0)
        while time.monotonic() < deadline_s and not self.has_lease():
            time.sleep(0.001)
        time.sleep(self._rng.uniform(0.0, 0.03))
        self._running[0].kill()
        for each in [each for each in self._running if each.poll() is not None]:
            self._end(each)

    def _end(self, command: subprocess.Popen[str]) -> None:
        _, errors = command.communicate()
        self._running.remove(command)
        was_refused = command.returncode == 1 and "one at a time does" in errors
        assert command.returncode in (0, 3, -signal.SIGKILL) or was_refused, errors

    def close(self) -> None:
        for each in list(self._running):
            each.kill()
            self._end(each)


def kill_something(place: Place, running: Clients, rng: random.Random) -> str:
    """Node caches that have served: one that is killed as it starts is started anew ever more
    seldom, and soon there would be none."""
    pids = [status.pid for status in serving(place)]
    if pids and rng.random() < 0.6:
        with suppress(ProcessLookupError):
            os.kill(rng.choice(pids), signal.SIGKILL)
        return "node cache"
    running.kill(rng.randrange(len(running.running)))
    return "client"


def reclaimers(place: Place) -> list[int]:
    """Which nodes take themselves for the one that reclaims."""
    return [each.pid for each in serving(place) if each.counters.get("reclaim_leases")]


def kill_reclaimer(place: Place) -> str:
    pids = wait_until(lambda: reclaimers(place), "a node reclaims")
    with suppress(ProcessLookupError):
        os.kill(pids[0], signal.SIGKILL)
    return "reclaimer"


@pytest.mark.process
@pytest.mark.parametrize("limits", [{}, LIMITED], ids=["no limit", "reclaimed"])
@pytest.mark.parametrize(
    "num_kills",
    [
        pytest.param(12, id="some"),
        pytest.param(200, id="200", marks=[pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
def test_whatever_is_killed_at_any_instant_files_are_whole_and_reads_are_right(
    place: Place, num_kills: int, limits: Mapping[str, float]
) -> None:
    rng, killed = random.Random(num_kills), {"node cache": 0, "client": 0}
    with clients(place, limits) as running:
        wait_until(lambda: running.num_answered() > 20, "all is going on")
        for number in range(num_kills):
            time.sleep(rng.uniform(0.0, LONGEST_PAUSE_S))
            if limits and number % 3 == 2:
                what = kill_reclaimer(place)
            else:
                what = kill_something(place, running, rng)
            killed[what] = killed.get(what, 0) + 1
            # Two that take over from a dead one in the same moment both do until the next beat.
            wait_until(lambda: len(reclaimers(place)) <= 1, "one node at a time reclaims")
        before = running.num_answered()
        wait_until(
            lambda: running.num_answered() > before + 20, "all is going on again", within_s=60.0
        )
        if limits:
            wait_until(lambda: len(reclaimers(place)) == 1, "one node reclaims")
        running.end()
        print(f"{running.num_answered()} prompts answered, killed: {killed}")
    assert min(killed.values()) > num_kills / 20
    check(place, limits)


@pytest.mark.process
@pytest.mark.parametrize(
    "num_kills",
    [
        pytest.param(8, id="some", marks=pytest.mark.long),
        pytest.param(200, id="200", marks=[pytest.mark.long, pytest.mark.timeout(1800)]),
    ],
)
def test_whenever_ucm_reclaim_is_killed_files_are_whole_and_the_next_one_reclaims(
    place: Place, num_kills: int
) -> None:
    rng = random.Random(num_kills)
    with clients(place, {}) as running:
        wait_until(lambda: running.num_answered() > 20, "all is going on")
        commands = Commands(place, rng)
        try:
            for _ in range(num_kills):
                commands.kill()
        finally:
            commands.close()
        running.end()
    done = ucm(*commands.arguments())
    assert done.returncode == 0, done.stderr
    (found,) = msgspec.json.decode(done.stdout, type=list[ReclaimedNow])
    assert found.num_files > 0
    check(place, {})


def check(place: Place, limits: Mapping[str, float]) -> None:
    for pid in node_cache_pids(place):
        kill(pid)
    check_files(place)
    check_reads(place, limits)


def check_files(place: Place) -> None:
    """Every file under the name of a page is whole, as `ucm verify` finds."""
    done = ucm("verify", "--json", place.store)
    found = msgspec.json.decode(done.stdout, type=Verified)
    assert done.returncode == 0, found
    assert found.num_whole == len(place.blocks()) > NUM_BLOCKS
    assert found.num_damaged == found.num_unreadable == found.num_misplaced == 0
    assert place.in_quarantine() == []


def check_reads(place: Place, limits: Mapping[str, float]) -> None:
    """Everything that is there is right, and what is not can be stored: nobody has to mend."""
    with UcmPipelineStore(config_of(place, "c", limits)) as reader:
        for number in range(NUM_PROMPTS):
            ids = prompt(number)
            num_hits = reader.lookup_on_prefix(ids) + 1
            # What is found may be reclaimed before it is loaded.
            with suppress(*[TaskFailed] if limits else []):
                assert load(reader, ids[:num_hits]) == rows(ids[:num_hits])
            dump(reader, ids[num_hits:])
        if not limits:
            reader.flush()
            assert len(place.blocks()) == NUM_PROMPTS * NUM_BLOCKS
