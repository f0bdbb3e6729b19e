"""A reserve of free space is never written into, and what is written goes on when there is more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.mounts import mount_tmpfs, own_mounts
from tests.store.tiers.tier_contract import LARGE, dump, load, make_key, make_page
from ucm.errors import TierError
from ucm.outcome import Outcome
from ucm.store.tiers.posix.space import FreeSpace, Space, SpaceReserve, look, reserve_bytes
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import ReadStatus

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("total_bytes", "min_free_bytes", "queue_bytes", "expected"),
    [
        pytest.param(1000 * GIB, None, 4 * GIB, 50 * GIB, id="a share of a large filesystem"),
        pytest.param(40 * GIB, None, 4 * GIB, 4 * GIB, id="a full queue"),
        pytest.param(2 * GIB, None, 4 * GIB, 2 * GIB // 5, id="a small one can be used at all"),
        pytest.param(1000 * GIB, 7 * GIB, 40 * GIB, 7 * GIB, id="what is set counts alone"),
        pytest.param(1000 * GIB, 0, 4 * GIB, 0, id="none"),
        pytest.param(0, None, 4 * GIB, 0, id="a size that is not told"),
    ],
)
def test_the_reserve_is_what_is_set_or_a_share(
    total_bytes: int, min_free_bytes: int | None, queue_bytes: int, expected: int
) -> None:
    space = Space(total_bytes, total_bytes)
    kept = reserve_bytes(space, min_free_bytes=min_free_bytes, queue_bytes=queue_bytes)
    assert kept == pytest.approx(expected, rel=1e-6)


@given(total=st.integers(1, 1 << 60), queue=st.integers(0, 1 << 60))
def test_without_a_setting_every_filesystem_can_be_filled_to_four_fifths(
    total: int, queue: int
) -> None:
    kept = reserve_bytes(Space(total, total), min_free_bytes=None, queue_bytes=queue)
    assert kept <= total / 5 * (1 + 1e-9)
    assert kept >= min(total / 20, total / 5) * (1 - 1e-9) - 1


def fill(tier: PosixTier, first: int) -> tuple[int, TierError]:
    """Dumps blocks from number `first` on; the first that was not taken, and why."""
    page = make_page(LARGE, "a")
    number = first
    try:
        for number in range(first, first + 1000):
            dump(tier, LARGE, make_key(number), page)
    except TierError as error:
        return number, error
    raise AssertionError("everything was written")


@own_mounts
def test_nothing_is_written_into_the_reserve_and_writing_goes_on_when_there_is_more(
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    mount_tmpfs(store, size_bytes=40 * MIB)
    tier = PosixTier([str(store)], free=FreeSpace(min_free_bytes=20 * MIB))
    tier.open_namespace(LARGE)

    refused, error = fill(tier, 0)
    assert error.reason == "full"
    assert str(store) in str(error) and "min_free_gb" in str(error)
    assert refused > 0
    assert look(str(store)).free_bytes >= 20 * MIB

    # Somebody else needs space: still nothing is taken.
    (store / "other").write_bytes(bytes(10 * MIB))
    again, _ = fill(PosixTier([str(store)], free=FreeSpace(min_free_bytes=20 * MIB)), refused)
    assert again == refused
    (store / "other").unlink()

    # What is there can be read, and space that is freed is used.
    assert not isinstance(load(tier, LARGE, make_key(0)), ReadStatus)
    for path in store.rglob("*.kv"):
        path.unlink()
    freed = PosixTier([str(store)], free=FreeSpace(min_free_bytes=20 * MIB))
    assert fill(freed, refused)[0] > refused


@own_mounts
def test_what_is_written_between_two_looks_is_taken_off(tmp_path: Path) -> None:
    """A look a second would let a fast writer through."""
    mount_tmpfs(tmp_path / "store", size_bytes=40 * MIB)
    path = str(tmp_path / "store")
    reserve = SpaceReserve(path, FreeSpace(min_free_bytes=10 * MIB), clock=lambda: 0.0)
    for _ in range(29):
        reserve.take(MIB)
    # Somebody else has written as much at the same time, which the last look could not see.
    (tmp_path / "store" / "other").write_bytes(bytes(20 * MIB))
    reserve.take(MIB)  # still by the last look
    (tmp_path / "store" / "ours").write_bytes(bytes(12 * MIB))
    with pytest.raises(TierError, match="min_free_gb"):
        reserve.take(MIB)
    (tmp_path / "store" / "ours").unlink()
    reserve.take(MIB)


@own_mounts
@pytest.mark.parametrize("min_free_bytes", [0, 10 * MIB])
def test_whether_there_is_room_can_be_known_without_writing(
    tmp_path: Path, min_free_bytes: int
) -> None:
    store = tmp_path / "store"
    mount_tmpfs(store, size_bytes=40 * MIB)
    tier = PosixTier([str(store)], free=FreeSpace(min_free_bytes=min_free_bytes))
    tier.open_namespace(LARGE)
    tier.check_room(LARGE, 0)

    (store / "other").write_bytes(bytes(look(str(store)).free_bytes - min_free_bytes))
    with pytest.raises(TierError) as refused:
        tier.check_room(LARGE, 0)
    assert refused.value.reason is Outcome.FULL
    assert list(store.rglob("*.kv")) == []


def test_a_backend_that_is_not_there_is_not_full(tmp_path: Path) -> None:
    """Whoever writes into it says what is wrong."""
    SpaceReserve(str(tmp_path / "missing"), FreeSpace(min_free_bytes=1 << 60)).take(MIB)
    PosixTier([str(tmp_path / "missing")]).check_room(LARGE, 0)


def test_a_filesystem_that_tells_no_size_is_not_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a Ceph cluster without a manager."""
    real = os.statvfs(tmp_path)
    told = os.statvfs_result((*real[:2], 0, 0, 0, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: told)
    SpaceReserve(str(tmp_path), FreeSpace(min_free_bytes=1 << 40)).take(MIB)
