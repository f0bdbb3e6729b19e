"""A hundred deaths and stops of node caches under clients that write and read all the time."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import ExitStack

import pytest

from tests.e2e.store import Store
from tests.store.node.support import Place, alive, child, engine, kill, log_of, wait_until
from ucm.config.settings import StoreSettings
from ucm.errors import NodeUnavailable
from ucm.store.tiers.posix import paths

pytestmark = [pytest.mark.process, pytest.mark.long, pytest.mark.timeout(1500)]

NUM_CLIENTS = 8
NUM_ENDS = 100
SEED = 20261126


def left_by(place: Place, pid: int) -> list[str]:
    found = ((path.name, paths.parse_temp_name(path.name)) for path in place.stray_files())
    return [name for name, temp in found if temp is None or temp.writer.process.pid == pid]


def serving(settings: StoreSettings) -> int:
    """The process that serves now, or 0."""
    try:
        with engine(settings, "watch/0") as watch:
            return watch.pid
    except NodeUnavailable:
        return 0


def test_after_a_hundred_kills_and_stops_nothing_is_left_and_no_byte_is_wrong(place: Place) -> None:
    settings = place.settings(sweep_dirs_per_s=100_000)
    rng = random.Random(SEED)
    left_by_killed = num_killed = 0
    with ExitStack() as stack:
        clients = [
            stack.enter_context(child("write_and_read", settings)) for _ in range(NUM_CLIENTS)
        ]
        for each in clients:
            assert each.stdin is not None
            each.stdin.write("go\n")
            each.stdin.flush()
        for number in range(NUM_ENDS):
            pid = wait_until(lambda: serving(settings), "one serves", within_s=60)
            time.sleep(rng.uniform(0.0, 1.0))
            if number % 3 == 2:
                os.kill(pid, signal.SIGTERM)
                wait_until(lambda pid=pid: not alive(pid), "it has left", within_s=60)
                assert left_by(place, pid) == []
            else:
                kill(pid)
                num_killed += 1
                left_by_killed += len(left_by(place, pid))
        checked = losses = 0
        for each in clients:
            output, _ = each.communicate("end\n", timeout=120)
            assert each.returncode == 0, "a client met a wrong byte, or the end of its patience"
            checked += int(output.split()[0])
            losses += int(output.split()[1])

    with engine(settings, "watch/0") as last:
        wait_until(lambda: not place.stray_files(), "the last start has swept", within_s=120)
        pid = last.pid
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not place.pids(), "no process is left")
    print(
        f"{num_killed} kills left {left_by_killed} files, {NUM_ENDS - num_killed} stops left none; "
        f"{losses} losses of a node cache, {checked} pages checked, {len(place.blocks())} stored, "
        f"{log_of(settings).count('temporary files of dead writers')} sweeps removed something"
    )
    assert left_by_killed, "a test of nothing"
    assert checked
    assert place.stray_files() == []
    assert place.blocks()
    assert Store(place.store, "float32").bad_files() == []
