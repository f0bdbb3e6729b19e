"""kill -9 of a writer at any instant leaves a whole block or none, and nothing to repair."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.children import HUGE
from tests.store.tiers.posix import tree
from tests.store.tiers.tier_contract import SMALL, content_of, dump, load, make_key, make_page
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import ReadStatus, TierNamespace

TIMEOUT_S = 60.0
ROOT = Path(__file__).parents[2]


@contextmanager
def child(*args: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.faults.children", *args]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def check_after_crash(store: Path, namespace: TierNamespace) -> ReadStatus:
    """The block is right or absent; every file has a name that we know; the next writer succeeds.
    Returns which of the two it was."""
    tier = PosixTier([str(store)])
    content = content_of(namespace, make_page(namespace, "a"))
    found = load(tier, namespace, make_key(1))
    assert found in (content, ReadStatus.ABSENT)
    assert tier.contains(namespace, [make_key(1)]) == (found == content)
    for path in store.rglob("*"):
        known = (
            tree.block_of(str(path.relative_to(store))),
            paths.parse_temp_name(path.name),
            path.name in (paths.MANIFEST, paths.BACKEND_ID),
            path.is_dir(),
        )
        assert any(known), path

    tier.open_namespace(namespace)
    dump(tier, namespace, make_key(1), make_page(namespace, "a"))
    assert load(tier, namespace, make_key(1)) == content
    return ReadStatus.HIT if found == content else ReadStatus.ABSENT


@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_a_writer_killed_before_any_call_leaves_a_whole_block_or_none(
    tmp_path: Path, io: str
) -> None:
    """Every step of the very first dump into an empty store: directories, manifest, block."""
    with child("die_at_every_step", str(tmp_path), io) as process:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    *calls, last = output.splitlines()
    assert last == "finished 0"
    assert {"mkdir", "open", "fsync", "link", "pwritev", "close", "rename"} <= set(calls)

    outcomes = [check_after_crash(tmp_path / str(step), SMALL) for step in range(len(calls) + 1)]

    published = outcomes.index(ReadStatus.HIT)
    assert calls[published - 1] == "rename"
    assert set(outcomes[published:]) == {ReadStatus.HIT}


def test_a_writer_killed_in_the_middle_of_its_write_leaves_no_block(tmp_path: Path) -> None:
    """The kernel gives up half-way through a large write when its process is killed."""
    for attempt in range(3):
        store = tmp_path / str(attempt)
        store.mkdir()
        with child("dump_huge", str(store)) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            while process.poll() is None and not any(
                os.path.getsize(path) for path in store.rglob("*.kv.*.tmp")
            ):
                pass
            process.kill()
            process.wait(TIMEOUT_S)

        check_after_crash(store, HUGE)
