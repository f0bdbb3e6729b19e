"""Each fault of storage at each of its operations, whatever a node cache is at: right or absent, in
time, counted, and over when the fault is."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress

import pytest

from tests.faults.fuse import FuseMount, mount_fuse, needs_fuse
from tests.faults.mounts import mount_tmpfs, own_mounts
from tests.matrix.all_phases import PHASES
from tests.matrix.cells import ABSENT, CELLS, DISK, NOTHING, Cell
from tests.matrix.phases import Bench
from tests.store.conftest import place as place
from tests.store.node.support import Place

SLOW_S = 0.05
# One of each kind in every run.
QUICK = {
    "dump-write-ENOSPC",
    "dump-rename-hang",
    "load-read-EIO",
    "load-read-short_reads",
    "lookup-lookup-hang",
    "start-lookup-EIO",
    "dump-(full_disk)-no_inodes",
    "reclaim-opendir-hang",
}


def begin(mount: FuseMount, cell: Cell) -> None:
    if cell.fault == "slow":
        mount.slow(cell.operation, SLOW_S)
    elif cell.fault == "hang":
        mount.hang(cell.operation)
    elif cell.fault == "short reads":
        mount.short_reads()
    elif cell.fault == "flipped bits":
        mount.corrupt_reads(times=100_000)
    elif cell.fault == "short writes":
        mount.short_writes()
    elif cell.fault == "lost ends":
        mount.lost_ends()
    else:
        mount.fail(cell.operation, getattr(errno, cell.fault), times=100_000)


def marks(cell: Cell) -> list[pytest.MarkDecorator]:
    """A store at its limit is a core's work."""
    alone = [pytest.mark.alone] if cell.phase == "reclaim" else []
    return alone if str(cell) in QUICK else [*alone, pytest.mark.long]


def params(*, of_a_disk: bool) -> list[object]:
    return [
        pytest.param(cell, id=str(cell), marks=marks(cell))
        for cell in CELLS
        if of_a_disk == (cell.operation == DISK)
    ]


def check_cost(cell: Cell, bench: Bench) -> None:
    said = set(bench.said)
    is_right = not said if cell.costs in (NOTHING, ABSENT) else cell.costs in said
    assert is_right, f"{said}, not {cell.costs}"


@needs_fuse
@pytest.mark.process
@pytest.mark.parametrize("cell", params(of_a_disk=False))
def test_a_fault_costs_what_the_matrix_says_and_nothing_else(
    place: Place, cell: Cell, caplog: pytest.LogCaptureFixture
) -> None:
    below = place.directory / "below"
    with mount_fuse(below, place.store) as mount:
        asked = 0

        def begin_fault() -> None:
            nonlocal asked
            asked = mount.calls[cell.operation]
            begin(mount, cell)

        bench = Bench(place, str(below), begin_fault, mount.release, lambda: caplog.text)
        PHASES[cell.phase](bench)
        assert mount.calls[cell.operation] > asked, "nobody has met the fault"
    check_cost(cell, bench)


@pytest.mark.process
@pytest.mark.parametrize("cell", params(of_a_disk=True))
@own_mounts
def test_a_full_disk_costs_what_the_matrix_says_and_nothing_else(
    place: Place, cell: Cell, caplog: pytest.LogCaptureFixture
) -> None:
    fillers = place.store / "fillers"
    mount_tmpfs(place.store, size_bytes=16 << 20, max_inodes=1000)

    def fill() -> None:
        fillers.mkdir()
        # Pages that are written meanwhile take of the same room: it is full before all fits.
        with suppress(OSError):
            if cell.fault == "no space":
                (fillers / "0").write_bytes(bytes(os.statvfs(place.store).f_bavail * 4096))
            for i in range(1000 if cell.fault == "no inodes" else 0):
                (fillers / str(i)).touch()

    def make_room() -> None:
        shutil.rmtree(fillers, ignore_errors=True)

    bench = Bench(place, str(place.store), fill, make_room, lambda: caplog.text)
    PHASES[cell.phase](bench)
    check_cost(cell, bench)
