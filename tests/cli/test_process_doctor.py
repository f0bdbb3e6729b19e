"""`ucm doctor` and `ucm bench`: what a mount can do, tried out and cleared away."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from tests.cli.conftest import PROMPT
from tests.cli.parts import ROOT, Store, keys_of, manifest, settings_file, ucm
from tests.faults.fuse import mount_fuse, needs_fuse
from tests.faults.mounts import mount_again, mount_ramfs, mount_read_only, mount_tmpfs, own_mounts
from ucm.store.inspect.examine import Diagnosis
from ucm.store.inspect.speed import Measured
from ucm.store.inspect.verdicts import Finding
from ucm.store.tiers.posix.tier import PosixTier

pytestmark = pytest.mark.process

A = manifest("a")


def findings(*args: object, status: int = 0) -> dict[str, Finding]:
    done = ucm("doctor", *args, "--json")
    assert done.returncode == status, done.stdout + done.stderr
    diagnosis = msgspec.json.decode(done.stdout, type=Diagnosis)
    (examined,) = diagnosis.backends
    return {finding.check: finding for finding in examined.findings}


def test_a_store_is_tried_out_and_left_as_it_was(filled: Store) -> None:
    before = filled.names()
    found = findings(filled.path)

    assert {"mount", "id", "rights", "space", "clock", "calls", "latency", "write", "read"} <= set(
        found
    )
    assert found["mount"].verdict == "warning"  # a disk of this machine's own
    assert "tokens/s" in found["read"].found
    assert filled.names() == before
    shown = ucm("doctor", filled.path)
    assert shown.stdout.splitlines()[-1].startswith("Fit for a store")
    assert "namespace" in shown.stdout and " a\n" in shown.stdout


def test_a_settings_file_says_what_is_wished_for(store: Store, tmp_path: Path) -> None:
    store.put(A, keys_of(A, PROMPT))
    config = settings_file(tmp_path, store.path, min_free_gb=1_000_000)

    found = findings(config, status=3)
    assert found["space"].verdict == "wrong" and "min_free_gb" in found["space"].fix


def test_storage_that_is_not_there_is_wrong_and_the_line_says_what_to_do(tmp_path: Path) -> None:
    found = findings(settings_file(tmp_path, tmp_path / "nowhere"), status=3)
    assert "ucm init" in found["storage"].fix


@own_mounts
def test_a_read_only_mount_is_looked_at_and_not_written_to(filled: Store, tmp_path: Path) -> None:
    mount_read_only(filled.path, tmp_path / "mnt")

    found = findings(tmp_path / "mnt")
    assert found["rights"].verdict == "warning" and "read-only" in found["rights"].found
    assert found["rights"].fix.startswith("mount it with rw")
    assert "write" not in found
    said = ucm("doctor", tmp_path / "mnt").stdout.splitlines()[-1]
    assert said.startswith("Fit to read a store, not to write one")


@own_mounts
def test_a_filesystem_without_inodes_is_told_so_beside_all_else(tmp_path: Path) -> None:
    disk = tmp_path / "full"
    mount_tmpfs(disk, size_bytes=1 << 28, max_inodes=20)
    while free := os.statvfs(disk).f_favail:
        (disk / f"file-{free}").touch()

    found = findings(disk, status=3)
    assert found["storage"].found == "making a folder: No space left on device"
    assert "no inode is left" in found["storage"].fix
    assert {"mount", "id", "rights", "space", "inodes"} <= set(found)


@needs_fuse
@pytest.mark.parametrize(
    ("operation", "doing"), [("mkdir", "making a folder"), ("opendir", "listing the directory")]
)
def test_what_this_user_may_not_is_told_beside_all_else(
    filled: Store, tmp_path: Path, operation: str, doing: str
) -> None:
    with mount_fuse(filled.path, tmp_path / "mnt") as mount:
        mount.fail(operation, errno.EACCES)
        found = findings(mount.path, status=3)
    assert found["storage"].found == f"{doing}: Permission denied"
    assert "its owner and mode" in found["storage"].fix
    assert {"mount", "id", "rights", "space"} <= set(found)


def test_pages_that_memory_has_no_room_for_are_told_beside_all_else(filled: Store) -> None:
    def with_little_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (900 << 20, 900 << 20))

    done = ucm(
        *("doctor", filled.path, "--page-kib", 1 << 18, "--json"), preexec_fn=with_little_memory
    )
    assert done.returncode == 3, done.stderr
    (examined,) = msgspec.json.decode(done.stdout, type=Diagnosis).backends
    found = {finding.check: finding for finding in examined.findings}
    assert "Cannot allocate memory" in found["storage"].found
    assert "--page-kib" in found["storage"].fix
    assert {"mount", "id", "rights", "space", "calls"} <= set(found)


@own_mounts
def test_too_few_inodes_no_direct_io_and_memory_are_told(tmp_path: Path) -> None:
    mount_tmpfs(tmp_path / "small", size_bytes=1 << 28, max_inodes=500)
    found = findings(tmp_path / "small", "--page-kib", 64)
    assert found["inodes"].verdict == "warning"
    assert "goes with this machine" in found["mount"].fix
    assert found["id"].verdict == "warning"

    mount_ramfs(tmp_path / "ram")
    done = ucm("doctor", tmp_path / "ram", "--page-kib", 64)
    assert "O_DIRECT: " in done.stdout and "io_direct has no effect here" in done.stdout


@own_mounts
def test_a_peers_mount_of_the_same_directory_sees_all_of_it(filled: Store, tmp_path: Path) -> None:
    mount_again(filled.path, tmp_path / "peer")

    found = findings(filled.path, "--peer-mount", tmp_path / "peer")
    for check in ("peer id", "new file", "after a miss", "asked again", "one-tick race"):
        assert found[check].verdict == "fine", found[check]


@needs_fuse
def test_a_peer_that_remembers_absences_is_told_and_ucm_asks_past_that(
    filled: Store, tmp_path: Path
) -> None:
    with mount_fuse(filled.path, tmp_path / "peer", negative_timeout_s=30.0) as peer:
        found = findings(filled.path, "--peer-mount", peer.path)
    assert found["after a miss"].verdict == "warning"
    assert "not within 1 s" in found["after a miss"].found
    assert found["asked again"].verdict == "fine"


@needs_fuse
@pytest.mark.long
def test_storage_that_hangs_is_said_to_hang_in_what_and_nobody_waits_for_it(
    filled: Store, tmp_path: Path
) -> None:
    with mount_fuse(filled.path, tmp_path / "mnt") as mount:
        mount.hang("write")
        found = findings(mount.path, status=3)
        mount.release()
    assert (
        "it hangs: after 20 s it is still making, writing and renaming files"
        in found["storage"].found
    )
    assert "its server" in found["storage"].fix


@needs_fuse
@pytest.mark.long
@pytest.mark.parametrize("named", ["directory", "settings"])
def test_a_mount_that_answers_nothing_at_all_is_said_to_hang(
    filled: Store, tmp_path: Path, named: str
) -> None:
    with mount_fuse(filled.path, tmp_path / "mnt") as mount:
        argument = mount.path if named == "directory" else settings_file(tmp_path, mount.path)
        mount.freeze()
        # What the kernel knows by itself is forgotten.
        time.sleep(2)
        found = findings(argument, status=3)
    doing = {"directory": "looking at what lies there", "settings": "listing the directory"}[named]
    assert f"it hangs: after 20 s it is still {doing}" in found["storage"].found


@needs_fuse
def test_a_quota_that_is_used_up_is_told_by_trying(filled: Store, tmp_path: Path) -> None:
    with mount_fuse(filled.path, tmp_path / "mnt") as mount:
        mount.fail("write", errno.EDQUOT)
        assert "raise the quota" in findings(mount.path, status=3)["write"].fix
        mount.release()
        mount.fail("mkdir", errno.EDQUOT)
        assert "raise the quota" in findings(mount.path, status=3)["storage"].fix


@pytest.mark.long
def test_a_peer_of_another_store_is_wrong(filled: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    other.put(A, keys_of(A, PROMPT))

    found = findings(filled.path, "--peer-mount", other.path, status=3)
    assert found["peer id"].verdict == "wrong"


def test_damaged_files_and_what_a_killed_tool_has_left_are_told(filled: Store) -> None:
    (filled.path / "ucm-probe-old").mkdir()
    aside = filled.path / "quarantine" / "ab"
    aside.mkdir(parents=True)
    (aside / "one").write_text("bad")

    found = findings(filled.path)
    assert "ucm-probe-old" in found["leftovers"].found
    assert found["quarantine"].verdict == "warning"


def test_a_link_in_quarantine_leads_nowhere(filled: Store) -> None:
    aside = filled.path / "quarantine"
    (aside / "ab").mkdir(parents=True)
    (aside / "ab" / "one").touch()
    (aside / "root").symlink_to("/etc")

    assert findings(filled.path)["quarantine"].found == "1 files in quarantine"
    assert "1 file in quarantine" in ucm("ls", filled.path).stdout


@own_mounts
def test_bench_on_a_full_disk_says_so_in_each_row(tmp_path: Path) -> None:
    disk = tmp_path / "full"
    mount_tmpfs(disk, size_bytes=1 << 20)
    (disk / "all").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))

    done = ucm("bench", disk, "--mib", 8, "--page-kib", 64, "--seconds", 0.1)
    assert done.returncode == 3, done.stderr
    writes = [line for line in done.stdout.splitlines() if line.startswith("write")]
    assert len(writes) == 6 and all("No space left on device" in line for line in writes)
    assert "File exists" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Nothing could be read: No space left on device")
    assert "make room" in done.stdout


def test_bench_writes_no_more_than_it_is_told(tmp_path: Path) -> None:
    done = ucm("bench", tmp_path, "--page-kib", 1 << 20, "--mib", 8)
    assert done.returncode == 1 and done.stdout == ""
    assert "say 2048 at least" in done.stderr


def test_bench_measures_each_way_and_clears_up(tmp_path: Path) -> None:
    done = ucm("bench", tmp_path, "--mib", 8, "--page-kib", 64, "--seconds", 0.2, "--json")

    (measured,) = msgspec.json.decode(done.stdout, type=list[Measured])
    assert len(measured.speeds) == 12
    assert {speed.num_threads for speed in measured.speeds} == {1, 4, 16}
    assert all(speed.problem or speed.pages_per_s > 0 for speed in measured.speeds)
    assert measured.dd_write is None or measured.dd_write > 0
    assert (measured.dd_write is None) == (shutil.which("dd") is None)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("args", [("bench", "--seconds", "60"), ("doctor", "--slow")])
def test_what_is_stopped_leaves_nothing(
    tmp_path: Path, args: tuple[str, ...], number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "ucm.cli.main", *args, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        deadline_s = time.monotonic() + 20
        while not any(tmp_path.glob("*/*")):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode != 0
    assert os.listdir(tmp_path) == []


def test_a_page_key_lets_anybody_write(store: Store) -> None:
    """Rights are about forging pages, which a seal rules out."""
    store.put(A, keys_of(A, PROMPT), tier=PosixTier([str(store.path)]))
    os.chmod(store.path, 0o777)

    assert "page_key_file" in findings(store.path)["rights"].fix
