"""The FUSE mount of the fault tests is a filesystem like others but for its delays and hangs."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from tests.faults.fuse import FuseMount, mount_fuse, needs_fuse

pytestmark = [pytest.mark.process, needs_fuse]

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0
FOREVER_S = 3600.0
MIB = 1 << 20


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[FuseMount]:
    with mount_fuse(tmp_path / "source", tmp_path / "mounted") as mounted:
        yield mounted


@contextmanager
def in_background(act: Callable[[], object]) -> Iterator[Future[object]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(act)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        if time.monotonic() > deadline:
            raise AssertionError("waited in vain")
        time.sleep(0.005)


# -- a filesystem ------------------------------------------------------------------------------


def test_what_several_processes_write_can_be_read_back(mount: FuseMount) -> None:
    script = (
        "import hashlib, os, sys; data = os.urandom(3_500_001); "
        "open(sys.argv[1], 'wb').write(data); print(hashlib.sha256(data).hexdigest())"
    )
    paths = [mount.path / f"file{i}" for i in range(4)]
    writers = [
        subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True)
        for path in paths
    ]
    expected = [writer.communicate()[0].strip() for writer in writers]

    with ThreadPoolExecutor() as pool:
        mounted = list(pool.map(Path.read_bytes, paths))
    assert [sha256(data).hexdigest() for data in mounted] == expected
    assert [(mount.source / path.name).read_bytes() for path in paths] == mounted
    assert sorted(os.listdir(mount.path)) == [path.name for path in paths]


def test_direct_io_reads_and_writes_the_same_bytes(mount: FuseMount) -> None:
    page = memoryview(mmap.mmap(-1, 2 * MIB))  # aligned as O_DIRECT needs it
    page[:] = os.urandom(2 * MIB)
    fd = os.open(mount.path / "file", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
    try:
        assert os.pwrite(fd, page, 0) == 2 * MIB
        expected = bytes(page)
        page[:] = bytes(2 * MIB)
        assert os.preadv(fd, [page], 0) == 2 * MIB
    finally:
        os.close(fd)
    assert page == expected == (mount.source / "file").read_bytes()


def test_a_rename_is_atomic(mount: FuseMount) -> None:
    """Whoever opens the name meanwhile finds one file or the other, whole."""
    name, wholes = mount.path / "name", [bytes([i]) * 100_000 for i in range(2)]
    name.write_bytes(wholes[0])

    def replace() -> None:
        for i in range(200):
            temp = mount.path / "temp"
            temp.write_bytes(wholes[i % 2])
            os.rename(temp, name)

    with in_background(replace) as replacing:
        seen = {name.read_bytes()}
        while not replacing.done():
            seen.add(name.read_bytes())
        replacing.result()
    assert seen == set(wholes)


def test_files_follow_their_folder_and_outlive_their_name(mount: FuseMount) -> None:
    (mount.path / "old").mkdir()
    with open(mount.path / "old" / "file", "xb") as file:
        file.write(b"before ")
        file.flush()
        os.rename(mount.path / "old", mount.path / "new")
        file.write(b"after")
        file.flush()
        assert (mount.path / "new" / "file").read_bytes() == b"before after"
        os.link(mount.path / "new" / "file", mount.path / "link")
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(mount.path / "link"))
        os.unlink(mount.path / "new" / "file")
        os.unlink(mount.path / "link")
        os.rmdir(mount.path / "new")
        assert os.fstat(file.fileno()).st_size == len(b"before after")
    assert os.listdir(mount.source) == []


def test_a_file_that_another_node_replaces_is_another_file(mount: FuseMount) -> None:
    (mount.path / "name").write_bytes(b"first")
    with open(mount.path / "name", "rb") as first:
        (mount.source / "temp").write_bytes(b"the second")
        os.rename(mount.source / "temp", mount.source / "name")
        assert (mount.path / "name").read_bytes() == b"the second"
        assert not os.path.samestat(os.fstat(first.fileno()), os.stat(mount.path / "name"))
        assert first.read() == b"first"


def test_a_file_is_made_exclusively_by_one_of_many(mount: FuseMount) -> None:
    def make(_: int) -> bool:
        try:
            os.close(os.open(mount.path / "name", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(make, range(32))) == 1


def test_a_long_listing_is_complete(mount: FuseMount) -> None:
    names = {f"{i:04}-{'x' * 100}" for i in range(1500)}
    for name in names:
        (mount.source / name).touch()
    assert set(os.listdir(mount.path)) == names
    assert mount.calls["readdir"] > 2  # it takes several answers


def test_sizes_times_and_modes_are_set(mount: FuseMount) -> None:
    path = mount.path / "file"
    path.write_bytes(b"0123456789")
    os.truncate(path, 4)
    os.utime(path, ns=(1_000_000_001, 2_000_000_002))
    path.chmod(0o640)
    for folder in (mount.path, mount.source):
        status = (folder / "file").stat()
        assert (status.st_size, status.st_mode & 0o777) == (4, 0o640)
        assert (status.st_atime_ns, status.st_mtime_ns) == (1_000_000_001, 2_000_000_002)
    assert os.statvfs(path).f_blocks == os.statvfs(mount.source).f_blocks


def test_without_a_timeout_a_new_name_is_seen_at_once(mount: FuseMount) -> None:
    assert not (mount.path / "name").exists()
    (mount.source / "name").touch()
    assert (mount.path / "name").exists()


# -- delays, hangs, and ends ---------------------------------------------------------------------


def test_a_hung_rename_happens_when_it_is_released_and_holds_up_no_other_folder(
    mount: FuseMount,
) -> None:
    for name in ("a", "b"):
        (mount.path / name).mkdir()
    (mount.path / "a" / "old").write_bytes(b"content")
    mount.hang("rename")
    with in_background(lambda: os.rename(mount.path / "a/old", mount.path / "a/new")) as renaming:
        try:
            wait_until(lambda: mount.calls["rename"] == 1)
            (mount.path / "b" / "other").write_bytes(b"other")
            assert (mount.path / "b" / "other").read_bytes() == b"other"
            assert (os.listdir(mount.source / "a"), renaming.done()) == (["old"], False)
        finally:
            mount.release()
    renaming.result()
    assert os.listdir(mount.path / "a") == ["new"]


def test_a_hung_lookup_holds_up_no_other_in_its_folder(mount: FuseMount) -> None:
    (mount.path / "known").write_bytes(b"content")
    fd = os.open(mount.path / "known", os.O_RDONLY)
    mount.hang("lookup")
    num_lookups = mount.calls["lookup"]
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(os.path.exists, mount.path / name) for name in ("asked", "as_well")]
        try:
            wait_until(lambda: mount.calls["lookup"] == num_lookups + 2)
            assert os.pread(fd, 100, 0) == b"content"
            assert not any(each.done() for each in asking)
        finally:
            mount.release()
            os.close(fd)
    assert [each.result() for each in asking] == [False, False]


def test_delayed_operations_are_done_in_the_end_and_hold_up_no_others(tmp_path: Path) -> None:
    delays_s = {"rename": 0.05, "write": FOREVER_S}
    with (
        ThreadPoolExecutor(1) as pool,
        mount_fuse(tmp_path / "source", tmp_path / "mounted", delays_s=delays_s) as mount,
    ):
        (mount.path / "empty").touch()
        writing = pool.submit((mount.path / "file").write_bytes, b"content")
        wait_until(lambda: mount.calls["write"] == 1)
        os.rename(mount.path / "empty", mount.path / "renamed")
        assert sorted(os.listdir(mount.path)) == ["file", "renamed"]
        assert not writing.done()
    # The end of the mount is an error for who still waits, and nothing was written.
    with pytest.raises(OSError, match=r"connection abort|not connected"):
        writing.result()
    assert (tmp_path / "source" / "file").read_bytes() == b""


def test_slowness_ends_with_a_release(mount: FuseMount) -> None:
    (mount.path / "file").touch()
    mount.slow("open", FOREVER_S)
    with in_background((mount.path / "file").read_bytes):
        wait_until(lambda: mount.calls["open"] == 1)
        mount.release()
        assert (mount.path / "file").read_bytes() == b""
        # Who waits already waits on.
        mount.kill_server()


def test_cut_reads_and_writes_say_how_much_they_did_and_lost_ends_do_not(mount: FuseMount) -> None:
    page = memoryview(mmap.mmap(-1, MIB))
    page[:] = os.urandom(MIB)
    # The kernel makes an error of a direct write that is cut.
    fd = os.open(mount.path / "file", os.O_RDWR | os.O_CREAT)
    try:
        mount.short_writes()
        assert os.pwrite(fd, page, 0) == MIB // 2
        mount.release()
        assert os.pwrite(fd, page, 0) == MIB
        mount.short_reads()
        direct = os.open(mount.path / "file", os.O_RDONLY | os.O_DIRECT)
        # The kernel may ask for it in several parts, each of which is cut.
        assert 0 < os.preadv(direct, [mmap.mmap(-1, MIB)], 0) < MIB
        mount.release()
        assert os.preadv(direct, [mmap.mmap(-1, MIB)], 0) == MIB
        os.close(direct)
        os.ftruncate(fd, 0)
        mount.lost_ends()
        assert os.pwrite(fd, page, 0) == MIB
    finally:
        os.close(fd)
    assert (mount.source / "file").read_bytes() == page[: MIB // 2]


def test_a_killed_server_is_an_error_for_everybody(mount: FuseMount) -> None:
    mount.hang("create")
    with in_background((mount.path / "file").touch) as creating:
        wait_until(lambda: mount.calls["create"] == 1)
        mount.kill_server()
    with pytest.raises(OSError, match=r"connection abort|not connected"):
        creating.result()
    with pytest.raises(OSError, match="not connected"):
        os.stat(mount.path)


def test_a_killed_test_leaves_no_mount(tmp_path: Path) -> None:
    """Even with an operation that hangs."""
    script = """
import sys, threading, time
from pathlib import Path
from tests.faults.fuse import mount_fuse
with mount_fuse(Path(sys.argv[1]), Path(sys.argv[2]), hang=["mkdir"]) as mount:
    threading.Thread(target=(mount.path / "folder").mkdir).start()
    while not mount.calls["mkdir"]:
        time.sleep(0.005)
    print("hangs", flush=True)
    time.sleep(3600)
"""
    path = tmp_path / "mounted"
    command = [sys.executable, "-c", script, str(tmp_path / "source"), str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        assert os.path.ismount(path)
        process.send_signal(signal.SIGKILL)
        wait_until(lambda: not os.path.ismount(path))
    assert os.listdir(path) == os.listdir(tmp_path / "source") == []
