"""Files that other nodes remove or replace under a reader, as network filesystems tell of it.

NFS says ESTALE of a file that is gone, at any operation; others say EBADF, or fail to close.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.fuse import FuseMount, mount_fuse, needs_fuse
from tests.store.node.support import FINGERPRINT, PAGE_BYTES, content, make_keys
from ucm.errors import TierError
from ucm.store.blocks.page_layout import padded_bytes
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import ReadStatus, TierNamespace

pytestmark = [pytest.mark.process, needs_fuse]

NAMESPACE = TierNamespace(FINGERPRINT, PAGE_BYTES, b"{}")
GONE = pytest.mark.parametrize("error", [errno.ESTALE, errno.EBADF], ids=errno.errorcode.get)
(KEY,) = make_keys("gone", 1)


def new_page() -> memoryview:
    return memoryview(bytearray(padded_bytes(PAGE_BYTES)))


def store(tier: PosixTier) -> None:
    tier.open_namespace(NAMESPACE)
    page = new_page()
    page[:PAGE_BYTES] = content(KEY)
    staged = tier.stage(NAMESPACE, KEY, page, num_tokens=128)
    assert staged is not None
    tier.publish(staged)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[FuseMount]:
    with mount_fuse(tmp_path / "store", tmp_path / "mounted") as mounted:
        yield mounted


@pytest.fixture
def tier(mount: FuseMount) -> PosixTier:
    tier = PosixTier([str(mount.path)])
    store(tier)
    return tier


@GONE
@pytest.mark.parametrize("operation", ["lookup", "open", "read", "getattr"])
def test_a_page_that_is_gone_is_absent_and_no_fault(
    tier: PosixTier, mount: FuseMount, operation: str, error: int
) -> None:
    """At whichever operation the filesystem says so."""
    mount.fail(operation, error)
    assert tier.read(NAMESPACE, KEY, new_page()).status is ReadStatus.ABSENT
    if operation == "lookup":
        assert tier.contains(NAMESPACE, [KEY]) == 0
        assert not tier.contains_now(NAMESPACE, KEY)
    mount.release()
    assert tier.read(NAMESPACE, KEY, new_page()).status is ReadStatus.HIT


@GONE
@pytest.mark.parametrize("operation", ["open", "read"])
def test_a_page_that_was_replaced_while_it_was_opened_is_opened_again(
    tier: PosixTier, mount: FuseMount, operation: str, error: int
) -> None:
    mount.fail(operation, error, times=1)
    page = new_page()
    assert tier.read(NAMESPACE, KEY, page).status is ReadStatus.HIT
    assert page[:PAGE_BYTES] == content(KEY)


@GONE
def test_a_page_that_was_read_well_is_a_hit_although_its_file_does_not_close(
    tier: PosixTier, mount: FuseMount, error: int
) -> None:
    mount.fail("flush", error)
    page = new_page()
    assert tier.read(NAMESPACE, KEY, page).status is ReadStatus.HIT
    assert page[:PAGE_BYTES] == content(KEY)


@GONE
def test_a_page_whose_old_file_is_gone_is_stored_again(
    tier: PosixTier, mount: FuseMount, error: int
) -> None:
    """Asking whether it is there already is a look like others."""
    page = new_page()
    mount.fail("open", error, times=1)
    staged = tier.stage(NAMESPACE, KEY, page, num_tokens=128)
    if staged is not None:
        tier.discard(staged)
    assert tier.contains(NAMESPACE, [KEY]) == 1


def test_other_errors_are_faults(tier: PosixTier, mount: FuseMount) -> None:
    """Not absences: who counts them has to look at the storage."""
    mount.fail("open", errno.EIO)
    assert tier.read(NAMESPACE, KEY, new_page()).status is ReadStatus.IO_ERROR
    mount.fail("lookup", errno.EIO)
    with pytest.raises(TierError, match="can't be looked up"):
        tier.contains(NAMESPACE, [KEY])


def test_a_file_that_refuses_direct_io_does_not_turn_it_off_for_the_others(
    mount: FuseMount,
) -> None:
    tier = PosixTier([str(mount.path)], direct_io=True)
    store(tier)
    mount.fail("read", errno.EINVAL, times=1)
    assert tier.read(NAMESPACE, KEY, new_page()).status is ReadStatus.HIT
    before = mount.calls
    for _ in range(3):
        assert tier.read(NAMESPACE, KEY, new_page()).status is ReadStatus.HIT
    assert (mount.calls - before)["open_direct"] == 3


def test_a_new_directory_costs_few_calls_and_no_look_at_the_manifest(mount: FuseMount) -> None:
    """Of 65536 directories nearly every page of a young store is the first."""
    tier, keys = PosixTier([str(mount.path)]), make_keys("new directories", 20)
    tier.open_namespace(NAMESPACE)
    page = new_page()
    before = mount.calls
    for i, key in enumerate(keys):
        if i == 1:
            before = mount.calls
        staged = tier.stage(NAMESPACE, key, page, num_tokens=128)
        assert staged is not None
        tier.publish(staged)
    calls = mount.calls - before
    assert (calls["create"], calls["rename"], calls["open"]) == (19, 19, 0)
    assert 19 < calls["mkdir"] <= 38
