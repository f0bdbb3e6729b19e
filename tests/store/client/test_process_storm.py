"""Very many clients without a node cache: one of them starts it, and all of them find it."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path
from subprocess import Popen

import pytest

from tests.store.node.children import CROWD
from tests.store.node.support import Place, child, kill, log_of, wait_until
from ucm.errors import NodeUnavailable
from ucm.store.client.start import connect_or_start, may_start
from ucm.store.node.lock import Holder

pytestmark = pytest.mark.process
# On two cores.
ALL_CONNECTED_S = 30.0


def reports(crowd: Popen[str], generation: int) -> set[int]:
    """Which node caches the crowd has met, once each of it has met one in this generation."""
    assert crowd.stdout is not None
    fd, deadline_s = crowd.stdout.fileno(), time.monotonic() + ALL_CONNECTED_S
    said, met = b"", dict[str, int]()
    while len(met) < CROWD:
        left_s = deadline_s - time.monotonic()
        assert left_s > 0, f"{len(met)} of {CROWD} are connected after {ALL_CONNECTED_S} s"
        if select.select([fd], [], [], left_s)[0]:
            said += os.read(fd, 1 << 16)
        *lines, said = said.split(b"\n")
        for who, reached, pid in (line.decode().split() for line in lines):
            if int(reached) == generation:
                met[who] = int(pid)
    return set(met.values())


@pytest.mark.alone
def test_a_crowd_without_a_node_cache_starts_exactly_one_also_after_a_kill(place: Place) -> None:
    settings = place.settings()
    starts = place.directory / "starts"
    with child("crowd", settings) as crowd:
        assert crowd.stdin is not None
        crowd.stdin.write("go\n")
        crowd.stdin.flush()
        for generation in range(3):
            (pid,) = reports(crowd, generation)
            assert len(starts.read_text().split()) == generation + 1
            kill(pid)
        crowd.communicate("done\n")


def test_a_rank_waits_for_its_scheduler_side_and_starts_none(place: Place) -> None:
    settings = place.settings()
    with pytest.raises(NodeUnavailable, match="no node cache answers"):
        connect_or_start(settings, session="e/0", role="worker", timeout_s=0.5)

    assert place.pids() == []
    assert not Path(f"{settings.socket_path}.log").exists()


def test_one_that_can_not_start_is_tried_ever_more_seldom_however_many_ask(place: Place) -> None:
    settings = place.settings()
    broken = place.settings(cache_capacity_bytes=-1)

    def ask() -> None:
        with pytest.raises(NodeUnavailable, match=r"see .*\.log for why it did not start"):
            connect_or_start(broken, session="e/0", role="scheduler", timeout_s=0.7)

    for _ in range(4):
        ask()

    wait_until(lambda: not place.pids(), "what was started has ended")
    assert log_of(settings).count("the node cache failed") in (1, 2)


def test_the_pause_between_starts_that_fail_grows_and_has_a_bound() -> None:
    def pause_s(failures: int) -> float:
        holder = Holder(tried_s=1000.0, failures=failures)
        return next(s for s in range(200) if may_start(holder, now_s=1000.0 + s))

    assert [pause_s(failures) for failures in (0, 1, 2, 3)] == [0, 2, 4, 8]
    assert pause_s(6) == pause_s(5000) == 60
    # A clock that was put back.
    assert may_start(Holder(tried_s=1000.0, failures=9), now_s=500.0)
