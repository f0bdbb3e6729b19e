"""Tools that look at files end although storage hangs, and say where; what only is slow they wait
for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cli.conftest import PROMPT
from tests.cli.parts import ROOT, Store, keys_of, manifest, settings_file, ucm
from tests.faults.fuse import mount_fuse, needs_fuse

pytestmark = [pytest.mark.process, needs_fuse]

A = manifest("a")
TOOLS = [
    ("ls",),
    ("du",),
    ("verify",),
    ("inspect", keys_of(A, PROMPT, salt="one")[0].hex()),
    ("bench", "--seconds", "0.1"),
    ("reclaim", "--dry-run", "--free-gb", "1"),
]
IDS = [tool[0] for tool in TOOLS]


def at(tool: tuple[str, ...], place: Path) -> tuple[str, ...]:
    return (*tool, str(place), "--timeout-s", "1.5")


@pytest.mark.parametrize("tool", TOOLS, ids=IDS)
def test_a_mount_that_answers_nothing_is_named_and_not_waited_for(
    filled: Store, tmp_path: Path, tool: tuple[str, ...]
) -> None:
    with mount_fuse(filled.path, tmp_path / "mnt") as mount:
        mount.freeze()
        # What the kernel knows by itself is forgotten.
        time.sleep(1.5)
        began_s = time.monotonic()
        done = ucm(*at(tool, mount.path))

        assert time.monotonic() - began_s < 30
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"ucm {tool[0]}: {mount.path}: storage doesn't answer: for 1.")
    assert "look at the mount" in line and "--timeout-s" in line


def test_one_file_that_hangs_is_enough_and_its_backend_is_named(
    filled: Store, tmp_path: Path
) -> None:
    hangs = filled.file(A, keys_of(A, PROMPT, salt="two")[3])
    with mount_fuse(filled.path, tmp_path / "mnt") as mount:
        config = settings_file(tmp_path, mount.path)
        mount.hang("read", file=hangs)
        done = ucm(*at(("verify",), config))
        mount.release()

    assert done.returncode == 1
    assert f"ucm verify: {mount.path}/" in done.stderr


@pytest.mark.parametrize("tool", ["verify", "du"])
def test_a_mount_that_is_slow_is_waited_for(filled: Store, tmp_path: Path, tool: str) -> None:
    """All of it takes longer than one answer may."""
    with mount_fuse(filled.path, tmp_path / "mnt") as mount:
        for operation in ("read", "opendir"):
            mount.slow(operation, 0.15)
        began_s = time.monotonic()
        done = ucm(*at((tool,), mount.path))

    assert time.monotonic() - began_s > 2
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_interrupted_in_a_mount_that_hangs_ends(
    filled: Store, tmp_path: Path, number: signal.Signals
) -> None:
    with mount_fuse(filled.path, tmp_path / "mnt") as mount:
        # It has up to 12 s to clear up.
        mount.hang("opendir")
        command = [sys.executable, "-m", "ucm.cli.main", "ls", str(mount.path)]
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
            before_s = time.monotonic()
            while not mount.calls["opendir"]:
                assert time.monotonic() - before_s < 20
                time.sleep(0.05)
            process.send_signal(number)
            process.communicate(timeout=30)
        mount.release()

    assert process.returncode != 0


def test_who_reads_slowly_is_no_storage_that_hangs(filled: Store) -> None:
    """A pipe is full after 64 KiB."""
    names = [name for name in filled.names() if len(Path(name).parts) == 1]
    namespace = next(name for name in names if len(name) == 64)
    command = [sys.executable, "-m", "ucm.cli.main", *at(("ls", "-n", namespace), filled.path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        time.sleep(4)
        assert process.stdout.read().count("\n") >= 6
    assert process.returncode == 0


def test_what_nobody_reads_any_more_ends(filled: Store) -> None:
    command = f"{sys.executable} -m ucm.cli.main ls {filled.path} --json | true"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, timeout=60, capture_output=True
    )
    assert done.stderr == b""


def test_what_cannot_be_written_is_said_in_one_line(filled: Store) -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "ucm.cli.main", "ls", str(filled.path)]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == "ucm ls: what it prints can't be written: No space left on device"


def test_a_terminal_has_its_cursor_again_after_a_mount_that_hangs(
    filled: Store, tmp_path: Path
) -> None:
    terminal, end = os.openpty()
    with mount_fuse(filled.path, tmp_path / "mnt") as mount:
        mount.hang("read")
        command = [sys.executable, "-m", "ucm.cli.main", *at(("verify",), mount.path)]
        with subprocess.Popen(command, cwd=ROOT, stdout=end, stderr=end) as process:
            os.close(end)
            shown = b""
            with suppress(OSError):
                while more := os.read(terminal, 65536):
                    shown += more
        mount.release()
    os.close(terminal)

    assert process.returncode == 1
    bar, _, after = shown.rpartition(b"\x1b[?25h")
    assert b"\x1b[?25l" in bar and b"\x1b[?25l" not in after
    assert after.startswith(b"ucm verify: ")
