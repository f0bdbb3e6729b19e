"""A node cache and its client in a container that is too small for what is configured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.store.node.support import ROOT, Place, log_of
from ucm.store.node import limits

pytestmark = pytest.mark.process

LIMIT_BYTES = 512 << 20


@pytest.fixture
def small() -> Iterator[Path]:
    """A memory group below this process's own, with a limit."""
    groups = [each for each in limits.memory_groups(Path("/proc")) if each[0].is_dir()]
    if not groups:
        pytest.skip("no memory groups (cgroup v1 or v2) are mounted here")
    parent, version = groups[0]
    group = parent / f"ucm-test-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"can't make a memory group in {parent}: {error}")
    try:
        try:
            (group / version.limits[0]).write_text(str(LIMIT_BYTES))
        except OSError as error:
            pytest.skip(f"can't limit the memory of {group}: {error}")
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            (parent / "cgroup.procs").write_text(pid)
        group.rmdir()


def test_a_container_that_is_too_small_gets_a_smaller_store_and_all_live(
    place: Place, small: Path
) -> None:
    settings = place.settings(cache_capacity_bytes=1 << 30)
    child = subprocess.run(
        [
            *(sys.executable, "-m", "tests.store.node.children", "fill"),
            msgspec.json.encode(settings).decode(),
        ],
        cwd=ROOT,
        preexec_fn=lambda: (small / "cgroup.procs").write_text(str(os.getpid())),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    pid, capacity_bytes, evictions, hits = map(int, child.stdout.split())
    assert 64 << 20 <= capacity_bytes <= LIMIT_BYTES // 2
    # All of it was in use: pages had to go for others.
    assert evictions > 0 and hits > 0
    # Alive, in the same container, and the first that the kernel would take.
    assert str(pid) in (small / "cgroup.procs").read_text().split()
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"
    assert re.search(
        rf"memory for slots: 0\.\d+ GiB \(not the 1\.00 of cache_buffer_capacity_gb: .*"
        rf"{re.escape(small.name)}/.*taken ahead, before pages come",
        log_of(settings),
    )
