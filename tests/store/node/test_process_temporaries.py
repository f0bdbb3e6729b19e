"""Node caches that are killed or stopped while they write leave no temporary files for good."""

from __future__ import annotations

import os
import re
import signal

import pytest

from tests.faults.fuse import mount_fuse, needs_fuse
from tests.store.node.support import (
    Engine,
    Place,
    alive,
    engine,
    kill,
    log_of,
    make_keys,
    wait_until,
)
from ucm.config.settings import StoreSettings
from ucm.store.node import protocol as p
from ucm.store.tiers.posix.paths import parse_temp_name

pytestmark = pytest.mark.process

NUM_PAGES = 20


def stage(client: Engine, name: str) -> None:
    """Pages that are written and can't be published: the block before them is never committed."""
    keys = make_keys(name, NUM_PAGES)
    offsets = client.reserve(keys)
    assert min(offsets) >= 0
    client.fill(keys, offsets)
    client.client.send(p.Commit(ns=1, keys=keys[1:], parents=keys[:-1]))


def writers_of(place: Place) -> list[int]:
    """The process that was writing each of the temporary files."""
    names = [parse_temp_name(file.name) for file in place.stray_files()]
    return [name.writer.process.pid for name in names if name is not None]


def test_what_killed_and_stopped_node_caches_were_writing_is_gone_after_the_next_start(
    place: Place,
) -> None:
    settings = place.settings(sweep_dirs_per_s=100_000)
    killed = stopped = 0
    for number in range(7):
        with engine(settings) as client:
            stage(client, f"prompt {number}")
            what = "its pages are staged, and those of the one before are gone"
            wait_until(
                lambda client=client: writers_of(place) == [client.pid] * (NUM_PAGES - 1), what
            )
            if number in (2, 5):
                os.kill(client.pid, signal.SIGTERM)
                wait_until(lambda pid=client.pid: not alive(pid), "it has left")
                assert place.stray_files() == []
                stopped += 1
            else:
                kill(client.pid)
                assert len(place.stray_files()) == NUM_PAGES - 1
                killed += 1
    assert (killed, stopped) == (5, 2)

    written = make_keys("written", 5)
    with engine(settings) as client:
        client.dump(written)
        wait_until(lambda: not place.stray_files(), "nothing is left")
        client.wait_written()
    assert place.blocks() == {place.block(key) for key in written}
    assert f"removed {NUM_PAGES - 1} temporary files of dead writers" in log_of(settings)


def test_a_start_removes_nothing_of_a_node_cache_that_lives(place: Place) -> None:
    """Two sockets, two node caches, one store."""
    keys = make_keys("prompt", NUM_PAGES)
    with engine(place.settings()) as client:
        stage(client, "prompt")
        wait_until(lambda: len(place.stray_files()) == NUM_PAGES - 1, "its pages are staged")
        for number in range(3):
            with engine(place.settings("b", sweep_dirs_per_s=100_000)) as other:
                what = "the living one's stay, and those of the dead go"
                wait_until(lambda: len(place.stray_files()) == NUM_PAGES - 1, what)
                if number < 2:
                    stage(other, f"other {number}")
                    wait_until(lambda: len(place.stray_files()) == 2 * NUM_PAGES - 2, "theirs too")
                    kill(other.pid)

        client.client.send(p.Commit(ns=1, keys=keys[:1], parents=[b""]))
        client.wait_written()
        assert place.blocks() == {place.block(key) for key in keys}
        assert place.stray_files() == []


@needs_fuse
def test_a_stop_that_storage_is_too_slow_for_leaves_no_temporary_file(place: Place) -> None:
    """Each write takes half a second: what is queued would take half a minute."""
    below = place.directory / "below"
    settings: StoreSettings = place.settings(write_threads=2, drain_s=0.5)
    with mount_fuse(below, place.store, delays_s={"write": 0.5}) as mount:
        with engine(settings) as client:
            client.dump(make_keys("slow", 100))
            wait_until(lambda: mount.calls["write"] > 2, "it is writing")
            os.kill(client.pid, signal.SIGTERM)
            wait_until(lambda: not alive(client.pid), "it has left")
        assert place.blocks()
        assert len(place.blocks()) < 100
        assert place.stray_files() == []
    assert re.search(r"leaving with \d+ pages unwritten: .* is too slow", log_of(settings))
