"""Storage that may be read but not written serves hits, and says why it takes no dumps."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.mounts import mount_ramfs, mount_read_only, own_mounts, without_privileges
from tests.store.tiers.tier_contract import (
    BLOCK_TOKENS,
    SMALL,
    content_of,
    dump,
    empty_page,
    load,
    make_key,
    make_namespace,
    make_page,
)
from ucm.errors import TierError
from ucm.store.tiers.posix import paths
from ucm.store.tiers.posix.tier import PosixTier
from ucm.store.tiers.tier import ReadStatus, Tier

OTHER = make_namespace("other", page_bytes=4096)


def check_that_it_reads_and_refuses_to_write(reader: Tier) -> None:
    reader.open_namespace(SMALL)
    reader.open_namespace(OTHER)

    assert reader.contains(SMALL, [make_key(1), make_key(2)]) == 1
    assert load(reader, SMALL, make_key(1)) == content_of(SMALL, make_page(SMALL, "a"))
    assert load(reader, SMALL, make_key(2)) is ReadStatus.ABSENT
    for namespace in (SMALL, OTHER):
        page = make_page(namespace, "b")
        with pytest.raises(TierError) as raised:
            reader.stage(namespace, make_key(2), page, num_tokens=BLOCK_TOKENS)
        assert raised.value.reason == "io_error"


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A directory that other users can get to; pytest's own are private."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def damage(store: Path) -> Path:
    block = Path(paths.block_path(str(store), SMALL.fingerprint, make_key(1)))
    block.write_bytes(block.read_bytes()[:-1])
    return block


@own_mounts
@pytest.mark.parametrize("num_backends", [1, 2])
def test_a_read_only_mount_can_be_read_from(tmp_path: Path, num_backends: int) -> None:
    store, mounted = tmp_path / "store", tmp_path / "mounted"
    store.mkdir()
    names = [f"disk{i}" for i in range(num_backends)]
    dump(PosixTier([str(store / n) for n in names]), SMALL, make_key(1), make_page(SMALL, "a"))
    mount_read_only(store, mounted)

    check_that_it_reads_and_refuses_to_write(PosixTier([str(mounted / name) for name in names]))


@own_mounts
@pytest.mark.parametrize("num_backends", [1, 2])
def test_an_empty_read_only_mount_has_nothing_and_no_error(
    tmp_path: Path, num_backends: int
) -> None:
    """And hits as soon as a writer elsewhere has dumped something."""
    store, mounted = tmp_path / "store", tmp_path / "mounted"
    names = [f"disk{i}" for i in range(num_backends)]
    for name in names:
        (store / name).mkdir(parents=True)
    mount_read_only(store, mounted)
    reader = PosixTier([str(mounted / name) for name in names])

    reader.open_namespace(SMALL)
    assert reader.contains(SMALL, [make_key(1)]) == 0
    assert load(reader, SMALL, make_key(1)) is ReadStatus.ABSENT

    dump(PosixTier([str(store / n) for n in names]), SMALL, make_key(1), make_page(SMALL, "a"))
    assert load(reader, SMALL, make_key(1)) == content_of(SMALL, make_page(SMALL, "a"))


@own_mounts
def test_a_damaged_file_on_a_read_only_mount_is_corrupt_each_time(tmp_path: Path) -> None:
    """It can't be moved aside from here; the result says so, and it is served to nobody."""
    store, mounted = tmp_path / "store", tmp_path / "mounted"
    dump(PosixTier([str(store)]), SMALL, make_key(1), make_page(SMALL, "a"))
    block = damage(store)
    mount_read_only(store, mounted)
    reader = PosixTier([str(mounted)])

    for _ in range(2):
        read = reader.read(SMALL, make_key(1), empty_page(SMALL))
        assert read.status is ReadStatus.CORRUPT
        assert "can't be moved aside: Read-only file system" in read.detail
    assert block.exists()


def test_directories_of_another_user_can_be_read_from(public_path: Path) -> None:
    """As with a mount: no permission to write is no error until something is written."""
    store = public_path / "store"
    store.mkdir()
    dump(PosixTier([str(store)]), SMALL, make_key(1), make_page(SMALL, "a"))
    for directory in [store, *[path for path in store.rglob("*") if path.is_dir()]]:
        directory.chmod(0o555)

    without_privileges(lambda: check_that_it_reads_and_refuses_to_write(PosixTier([str(store)])))


def test_a_file_that_may_not_be_read_is_an_io_error_and_stays(public_path: Path) -> None:
    store = public_path / "store"
    dump(PosixTier([str(store)]), SMALL, make_key(1), make_page(SMALL, "a"))
    block = Path(paths.block_path(str(store), SMALL.fingerprint, make_key(1)))
    block.chmod(0)

    def read() -> None:
        result = PosixTier([str(store)]).read(SMALL, make_key(1), empty_page(SMALL))
        assert result.status is ReadStatus.IO_ERROR
        assert f"{block}: can't be read: Permission denied" in result.detail

    without_privileges(read)
    assert block.exists()


def test_a_store_that_may_not_be_searched_is_an_error_in_lookups(public_path: Path) -> None:
    """Absent and forbidden are different misses: the caller counts them apart."""
    store = public_path / "store"
    dump(PosixTier([str(store)]), SMALL, make_key(1), make_page(SMALL, "a"))
    (store / SMALL.fingerprint.hex()).chmod(0)

    def look() -> None:
        tier = PosixTier([str(store)])
        with pytest.raises(TierError, match="Permission denied"):
            tier.contains(SMALL, [make_key(1)])
        assert load(tier, SMALL, make_key(1)) is ReadStatus.IO_ERROR

    without_privileges(look)


@own_mounts
def test_a_filesystem_without_direct_io_is_read_and_written_buffered(tmp_path: Path) -> None:
    store = tmp_path / "store"
    mount_ramfs(store)
    dump(PosixTier([str(store)]), SMALL, make_key(1), make_page(SMALL, "a"))
    block = paths.block_path(str(store), SMALL.fingerprint, make_key(1))
    with pytest.raises(OSError, match="Invalid argument"):
        os.open(block, os.O_RDONLY | os.O_DIRECT)
    for first in ("read", "dump"):
        tier = PosixTier([str(store)], direct_io=True)
        if first == "dump":
            assert dump(tier, SMALL, make_key(2), make_page(SMALL, "b"))
        assert load(tier, SMALL, make_key(1)) == content_of(SMALL, make_page(SMALL, "a"))

    assert not list(store.rglob("*.tmp"))
