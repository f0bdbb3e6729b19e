"""`ucm stat`: what a node cache does, over its socket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.cli.parts import ROOT, ucm
from tests.store.api import whole_store as api
from tests.store.node.support import Place, engine, kill, make_keys
from ucm.store.inspect.node_view import NodeView, StatusSample, node_view
from ucm.store.node import protocol as p

pytestmark = pytest.mark.process


def test_it_shows_slots_queues_rates_and_where_hits_come_from(place: Place) -> None:
    socket = place.settings().socket_path
    ids = api.IDS[:10]
    with api.whole_blocks(place) as store:
        api.dump(store, ids)
        store.flush()
        done = ucm("stat", socket, "--once", "--json", "--interval", 0.2)
        assert done.returncode == 0, done.stderr
        view = msgspec.json.decode(done.stdout, type=NodeView)

        assert (view.num_clients, view.backends) == (1, [str(place.store)])
        assert view.slots["ready"] == 10 and view.rates.seconds >= 0.2
        assert (view.missed, view.unwritten) == ({}, {})
        shown = ucm("stat", socket, "--once", "--interval", 0.1).stdout
        assert "slots    0 free" not in shown and "10 ready" in shown
        assert shown.endswith("All is well.\n")


def test_it_goes_on_with_a_line_for_each_interval_until_it_is_interrupted(place: Place) -> None:
    with engine(place.settings()) as client:
        client.dump(make_keys("a", 3))
        command = [sys.executable, "-m", "ucm.cli.main", "stat", place.settings().socket_path]
        process = subprocess.Popen(
            [*command, "--json", "--interval", "0.1"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdout is not None
            for _ in range(3):
                view = msgspec.json.decode(process.stdout.readline(), type=NodeView)
                assert view.slots["ready"] == 3
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        assert (process.returncode, said) == (0, "")


def test_without_a_node_cache_it_is_one_line(place: Place, tmp_path: Path) -> None:
    for node in (place.store, tmp_path / "nothing"):
        done = ucm("stat", node)
        assert done.returncode == 1
        assert done.stderr.startswith("ucm stat: ") and done.stderr.count("\n") == 1
    assert os.listdir(place.store) == []


def test_without_a_node_cache_it_says_how_one_starts(place: Place) -> None:
    """Also where one has been killed, and left its socket."""
    settings = place.settings()
    with engine(settings) as client:
        kill(client.pid)
    for node in (place.store, settings.socket_path):
        said = ucm("stat", node).stderr
        assert "no node cache runs" in said and "ucm node-cache --config FILE" in said
        assert "Errno" not in said


def sample(at_s: float, **counters: int) -> StatusSample:
    slots = ("free", "filling", "ready", "aside", "pins", "evictions", "capacity_bytes")
    status = p.Status(
        id=1,
        pid=7,
        arena="a",
        slots=dict.fromkeys((*slots, "reads_stalled", "writes_stalled"), 0),
        sessions={"tool": {"connections": 1}},
        queues={},
        counters=counters,
        invariant="",
    )
    return StatusSample(status, at_s)


def test_hits_are_split_by_where_the_pages_were() -> None:
    before = sample(10.0, lookup_blocks_asked=5, lookup_blocks_hit=5, read_hit=5)
    after = sample(
        12.0,
        lookup_blocks_asked=105,
        lookup_blocks_hit=85,
        read_hit=25,
        tier_read_pages=20,
        tier_read_us=50_000,
        lookup_ended_never_stored=3,
        write_failed_full=2,
        dump_dropped_full=1,
    )
    view = node_view(before, after, socket="/s", backends=[])

    assert (view.rates.blocks_asked, view.rates.hit_memory, view.rates.hit_files) == (50, 30, 10)
    assert view.read_ms == 2.5 and view.write_ms is None
    assert view.missed == {"never_stored": 3}
    assert view.unwritten == {"full": 3}


def test_what_a_far_tier_reads_is_from_files_too() -> None:
    before = sample(10.0)
    after = sample(
        12.0,
        lookup_blocks_hit=80,
        read_hit=20,
        far_read_hit=10,
        tier_read_pages=20,
        far_tier_read_pages=10,
    )
    view = node_view(before, after, socket="/s", backends=[])

    assert (view.rates.hit_memory, view.rates.hit_files, view.rates.pages_read) == (25, 15, 15)
