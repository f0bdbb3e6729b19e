"""Names say who made a file, and nobody removes what a writer that may be alive has made."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.store import processes
from ucm.store.processes import UNKNOWN, Process
from ucm.store.tiers.posix import writers
from ucm.store.tiers.posix.writers import Fate

HOUR_S = 3600.0
HERE = Process("node1.example.com", "0123456789abcdef", 100, 5_000)

worlds = st.text("0123456789abcdef", min_size=16, max_size=16)
pids = st.integers(0, 1 << 40)
made = st.builds(Process, host=st.text(max_size=80), world=worlds, pid=pids, began=pids)
# Few of each, so that they meet.
hosts = st.sampled_from(["node1.example.com", "node1_example_com", "node2", ""])
few = st.builds(
    Process,
    host=hosts,
    world=st.sampled_from([HERE.world, UNKNOWN, "f" * 16]),
    pid=st.sampled_from([0, 1, 100]),
    began=st.sampled_from([0, 5_000, 5_001]),
)


def named(process: Process, now_s: float = 1_700_000_000.5) -> str:
    return writers.writer_name(process, now_s=now_s, random="fedcba9876543210")


def parse(name: str) -> writers.WriterName | None:
    match = re.compile(writers.PATTERN, re.ASCII).fullmatch(name)
    return None if match is None else writers.parsed(match)


def test_names_are_these() -> None:
    assert named(HERE) == (
        "node1_example_com-0123456789abcdef-100-5000-1700000000-fedcba9876543210"
    )


@given(process=made, now_s=st.floats(-1e9, 1e12))
def test_what_is_named_can_be_parsed_and_is_seen_by_its_own(process: Process, now_s: float) -> None:
    name = named(process, now_s)
    found = parse(name)

    assert found is not None
    assert re.fullmatch(r"[A-Za-z0-9_]{1,64}-[-0-9a-f]+", name)
    assert (found.process.world, found.process.pid) == (process.world, process.pid)
    assert found.process.began == process.began
    assert found.created_s == max(0, int(now_s))
    assert writers.is_seen(found.process, here=process) == (process.world != UNKNOWN)


@given(writer=few, here=few, runs=st.sampled_from([True, False, None]))
def test_a_writer_is_dead_only_where_its_own_world_says_so(
    writer: Process, here: Process, runs: bool | None
) -> None:
    asked: list[tuple[int, int]] = []

    def is_running(pid: int, began: int) -> bool | None:
        asked.append((pid, began))
        return runs

    found = writers.fate(writer, here=here, is_running=is_running)

    is_own = here.world == writer.world and here.world != UNKNOWN
    if asked:
        assert is_own, "a process id means nothing anywhere else"
        assert asked == [(writer.pid, writer.began)]
        assert found is {True: Fate.ALIVE, False: Fate.DEAD, None: Fate.UNSEEN}[runs]
    else:
        assert found is Fate.UNSEEN
        assert not is_own or writer.host != here.host


@given(age_s=st.none() | st.floats(-1e9, 1e12), stale_s=st.sampled_from([0.0, HOUR_S]))
def test_nothing_is_stale_before_its_time_or_without_a_clock(
    age_s: float | None, stale_s: float
) -> None:
    is_stale = writers.is_stale(age_s, stale_s=stale_s)
    assert is_stale == (stale_s > 0 and age_s is not None and age_s >= HOUR_S)


def test_a_copy_of_a_running_machine_with_another_host_name_is_somebody_else() -> None:
    copy = Process("node2", HERE.world, HERE.pid, HERE.began)
    assert not writers.is_seen(copy, here=HERE)


def test_this_process_runs_and_is_known_again() -> None:
    this = processes.this_process()
    assert this.world != UNKNOWN
    assert processes.is_running(this.pid, this.began) is True
    assert processes.is_running(this.pid, this.began + 1) is False, "an id that is used again"
    assert processes.is_running(2**70, 0) is False
    assert processes.this_process() is this


FORKED = """
import os, sys
from ucm.store.processes import this_process
parent = this_process()
if not os.fork():
    mine = this_process()
    print(mine.world, mine.pid, mine.began, mine.pid != parent.pid, flush=True)
    os._exit(0)
sys.stdin.read()
"""


def test_a_child_is_another_process_of_the_same_world_until_it_has_ended() -> None:
    this = processes.this_process()
    command = [sys.executable, "-c", FORKED]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        parent_began = processes.state_and_start(parent.pid)[1]
        world, child, began, is_another = parent.stdout.readline().split()
        assert (world, is_another) == (this.world, "True")
        assert processes.is_running(parent.pid, int(parent_began)) is True

        deadline_s = time.monotonic() + 20
        while processes.state_and_start(int(child))[0] != "Z":
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        assert processes.is_running(int(child), int(began)) is False, "nobody has waited for it"
        parent.communicate("")
    assert processes.is_running(parent.pid, int(parent_began)) is False


SHOW = "from ucm.store.processes import this_process as t; print(t().world, t().pid)"


def test_the_same_process_id_in_another_container_is_somebody_else() -> None:
    def show(*before: str) -> list[str]:
        command = [*before, sys.executable, "-c", SHOW]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode and before:
            pytest.skip(f"no namespaces here: {done.stderr.strip()}")
        return done.stdout.split()

    inside = ("unshare", "--pid", "--fork", "--mount-proc")
    (here, _), (one, one_pid), (other, other_pid) = show(), show(*inside), show(*inside)

    assert here == processes.this_process().world
    assert one_pid == other_pid == "1"
    assert here not in (one, other)
    foreign_proc, _ = show("unshare", "--pid", "--fork")
    assert foreign_proc == UNKNOWN, "its /proc numbers the processes of another namespace"
