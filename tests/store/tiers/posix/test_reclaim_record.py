"""What was reclaimed is remembered, within bounds, whatever happens to who writes it down."""

from __future__ import annotations

import itertools
import os
import signal
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.mounts import mount_tmpfs, own_mounts
from tests.parts.strangers import run_as_stranger
from tests.store.tiers.posix.reclaim_parts import MIB, limited_tier, reclaiming, until, write
from tests.store.tiers.tier_contract import make_key, make_namespace
from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.plain_files import NotPlain
from ucm.store.tiers.posix.reclaim_record import (
    decode_reclaims,
    encode_reclaims,
    look_up_reclaims,
    mark_of,
)
from ucm.store.tiers.posix.reclaim_record_files import (
    GENERATION_BYTES,
    ReclaimRecorder,
    reclaims_on_record,
)
from ucm.store.tiers.posix.rights import UMASK_DECIDES, FileRights

MARKS = st.integers(0, (1 << 64) - 1)
TIMES = st.integers(0, (1 << 63) - 1)
# A pool's time and marks, and whether something before it went unrecorded.
POOL = st.tuples(TIMES, st.lists(MARKS, min_size=1, max_size=2500), st.booleans())


def encoded(pool: tuple[int, list[int], bool]) -> bytes:
    time_ns, marks, is_behind_gap = pool
    return encode_reclaims(time_ns, marks, is_behind_gap=is_behind_gap)


@given(st.lists(POOL, max_size=4))
def test_all_that_was_recorded_is_read_again_in_its_order(
    pools: list[tuple[int, list[int], bool]],
) -> None:
    batches = list(decode_reclaims(b"".join(map(encoded, pools))))

    said = [(batch.time_ns, mark) for batch in batches for mark in batch.marks]
    assert said == [(time_ns, mark) for time_ns, marks, _ in pools for mark in marks]
    assert sum(batch.is_behind_gap for batch in batches) == sum(is_gap for *_, is_gap in pools)


@given(st.lists(POOL, max_size=3), st.integers(1, 99), st.lists(POOL, max_size=3), st.data())
def test_what_was_torn_off_is_passed_over_and_leaves_a_gap(
    before: list[tuple[int, list[int], bool]],
    num_marks: int,
    after: list[tuple[int, list[int], bool]],
    data: st.DataObject,
) -> None:
    whole = encode_reclaims(5, range(num_marks), is_behind_gap=False)
    torn = whole[: data.draw(st.integers(1, len(whole) - 1))]
    first, then = (b"".join(map(encoded, pools)) for pools in (before, after))

    expected = [*decode_reclaims(first), *decode_reclaims(then)]
    if after:
        at = len(list(decode_reclaims(first)))
        expected[at] = replace(expected[at], is_behind_gap=True)
    assert list(decode_reclaims(first + torn + then)) == expected


@given(st.lists(POOL, min_size=1, max_size=4))
def test_a_page_that_went_more_than_once_is_told_by_its_last_time(
    pools: list[tuple[int, list[int], bool]],
) -> None:
    last = {mark: time_ns for time_ns, marks, _ in pools for mark in marks}
    found = look_up_reclaims(b"".join(map(encoded, pools)), {*last, 7})

    assert found.times_ns == last
    begins = max([0, *(number for number, pool in enumerate(pools) if pool[2])])
    assert found.since_ns == pools[begins][0]


def test_pages_of_one_key_that_are_sealed_by_different_page_keys_are_told_apart() -> None:
    marks = [mark_of(make_key(1), key_id) for key_id in (b"", b"\1" * 8, b"\2" * 8)]
    assert len(set(marks)) == 3


def test_an_empty_record_says_nothing() -> None:
    assert look_up_reclaims(b"", {1}).since_ns is None
    assert look_up_reclaims(b"UCMr", {1}).since_ns is None


# -- files -------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


def recorder(rights: FileRights = UMASK_DECIDES) -> ReclaimRecorder:
    return ReclaimRecorder(rights)


def newer(store: Path) -> Path:
    return store / paths.RECLAIM_RECORD


def older(store: Path) -> Path:
    return store / paths.RECLAIM_RECORD_BEFORE


def times(store: Path, *marks: int) -> dict[int, int]:
    return dict(reclaims_on_record(str(store), marks).times_ns)


def since(store: Path) -> int | None:
    return reclaims_on_record(str(store), ()).since_ns


def test_nothing_on_record_is_no_error(tmp_path: Path) -> None:
    assert since(tmp_path) is None


def test_a_pool_without_deletions_writes_nothing(tmp_path: Path, root: int) -> None:
    recorder().record(root, 1, [])
    assert os.listdir(tmp_path) == []


def test_one_follows_another_in_the_same_record(tmp_path: Path, root: int) -> None:
    recorder().record(root, 100, [1, 2])
    recorder().record(root, 200, [2, 3])
    assert times(tmp_path, 1, 2, 3, 4) == {1: 100, 2: 200, 3: 200}
    assert since(tmp_path) == 100


def test_the_record_is_bounded_and_half_a_million_deletions_are_always_on_it(
    tmp_path: Path, root: int
) -> None:
    mine = recorder()
    num_pools, per_pool = 120, 20_000
    for pool in range(num_pools):
        mine.record(root, pool, range(pool * per_pool, (pool + 1) * per_pool))
        used_bytes = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert used_bytes < 2 * GENERATION_BYTES + 2 * 8 * per_pool
    assert set(tmp_path.iterdir()) == {newer(tmp_path), older(tmp_path)}
    last = num_pools * per_pool
    asked = range(last - (1 << 19), last)
    assert len(times(tmp_path, *asked)) == 1 << 19
    assert times(tmp_path, 0) == {}
    first = since(tmp_path)
    assert first is not None and 0 < first <= num_pools - (1 << 19) // per_pool


def test_what_could_not_be_written_is_a_gap_that_the_next_batch_tells_of(
    tmp_path: Path, root: int
) -> None:
    mine = recorder()
    mine.record(root, 100, [1])
    newer(tmp_path).rename(tmp_path / "aside")
    newer(tmp_path).mkdir()
    mine.record(root, 200, [2])
    assert mine.problem == "ucm-reclaim-record: Is a directory"
    newer(tmp_path).rmdir()
    (tmp_path / "aside").rename(newer(tmp_path))
    mine.record(root, 300, [3])
    mine.record(root, 400, [4])

    assert times(tmp_path, 1, 2, 3, 4) == {1: 100, 3: 300, 4: 400}
    assert since(tmp_path) == 300 and not mine.problem


@own_mounts
def test_a_full_disk_costs_the_record_a_gap_and_reclaim_nothing(tmp_path: Path) -> None:
    mount_tmpfs(tmp_path, size_bytes=1 << 20)
    root = os.open(tmp_path, os.O_RDONLY)
    try:
        mine = recorder()
        mine.record(root, 100, [1])
        (tmp_path / "full").write_bytes(bytes((1 << 20) - 4096))
        for pool in range(10):
            assert not mine.problem
            mine.record(root, 200 + pool, range(1000))
        (tmp_path / "full").unlink()
        mine.record(root, 300, [2])
        assert times(tmp_path, 1, 2) == {1: 100, 2: 300}
        assert since(tmp_path) == 300
    finally:
        os.close(root)


def test_no_link_is_followed_and_nothing_that_is_no_file_is_written_to(
    tmp_path: Path, root: int
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    newer(tmp_path).symlink_to(target)
    recorder().record(root, 100, [1])
    assert target.read_bytes() == b"mine" and newer(tmp_path).is_symlink()
    with pytest.raises(NotPlain, match="is a link"):
        times(tmp_path, 1)

    newer(tmp_path).unlink()
    os.mkfifo(newer(tmp_path))
    reader = os.open(newer(tmp_path), os.O_RDONLY | os.O_NONBLOCK)
    try:
        recorder().record(root, 100, [1])
        assert newer(tmp_path).is_fifo() and os.read(reader, 100) == b""
    finally:
        os.close(reader)


def test_its_files_have_the_rights_of_the_backend(tmp_path: Path, root: int) -> None:
    recorder(FileRights(file_mode=0o640)).record(root, 100, [1])
    assert stat.S_IMODE(newer(tmp_path).stat().st_mode) == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_who_may_not_append_to_anothers_record_begins_one(tmp_path: Path, root: int) -> None:
    """Both are read."""
    store = tmp_path / "store"
    store.mkdir()
    store.chmod(0o777)
    for path in [tmp_path, *tmp_path.parents]:
        if path.stat().st_uid == 0 and path != Path("/") and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o055)
    fd = os.open(store, os.O_RDONLY)
    try:
        recorder(FileRights(file_mode=0o644)).record(fd, 100, [1])
    finally:
        os.close(fd)
    run_as_stranger(
        "from tests.store.tiers.posix.test_reclaim_record import *",
        "recorder().record(os.open(sys.argv[1], os.O_RDONLY), 200, [2])",
        store,
    )
    assert times(store, 1, 2) == {1: 100, 2: 200}
    assert since(store) == 100


def test_one_that_is_killed_while_it_writes_leaves_a_record_to_go_on_with(
    tmp_path: Path, root: int
) -> None:
    for number in range(20):
        pid = os.fork()
        if pid == 0:
            mine = recorder()
            while True:
                mine.record(root, 1000 + number, [number, *range(1 << 32, (1 << 32) + 255)])
        try:
            until(lambda mark=number: times(tmp_path, mark), "it has begun")
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    recorder().record(root, 5, [99])
    assert times(tmp_path, 19, 99) == {19: 1019, 99: 5}


# -- reclaim -----------------------------------------------------------------------------------


def test_what_a_node_reclaims_is_on_record_and_nothing_else(tmp_path: Path) -> None:
    namespace = make_namespace("model", page_bytes=60 << 10)
    tier = limited_tier(tmp_path / "store", limit_bytes=2 * MIB)
    with reclaiming(tier) as node:
        number = 0

        def has_reclaimed_some() -> bool:
            nonlocal number
            number += write(tier, namespace, number)
            return node["reclaimed_files_capacity"] >= 40

        until(has_reclaimed_some, "it reclaims")
    keys: dict[int, Key] = {mark_of(make_key(each), b""): make_key(each) for each in range(number)}
    on_record = {keys[mark] for mark in times(tmp_path / "store", *keys)}
    assert on_record == node.removed


def test_a_node_that_can_keep_no_record_says_so_and_reclaims(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    namespace = make_namespace("model", page_bytes=60 << 10)
    tier = limited_tier(tmp_path / "store", limit_bytes=2 * MIB)
    newer(tmp_path / "store").mkdir(parents=True)
    with reclaiming(tier):
        numbers = itertools.count()

        def has_said_so() -> bool:
            write(tier, namespace, next(numbers))
            return any("is not put on record" in line for line in caplog.messages)

        until(has_said_so, "it is said")
