"""examples/store_roundtrip.py is run as its docstring says."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.process


def run(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "examples/store_roundtrip.py", str(directory)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_roundtrip_finds_every_byte_and_leaves_no_process(tmp_path: Path) -> None:
    directory = tmp_path / "new"
    directory.mkdir()

    done = run(directory)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("every byte is right") == 2
    assert running_in(directory) == []


def test_the_roundtrip_fails_when_files_are_not_what_it_expects(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()

    done = run(tmp_path)

    assert done.returncode == 1
    assert "give an empty directory" in done.stderr


def running_in(directory: Path) -> list[Path]:
    """Command lines, in /proc, that name `directory`."""
    found = []
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            if os.fsencode(directory) in command_line.read_bytes():
                found.append(command_line)
    return found
