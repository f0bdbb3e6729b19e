"""Directories of pages, name by name."""

from __future__ import annotations

import os
from pathlib import Path

from ucm.store.inspect.walk import files_in


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_who_stops_in_the_middle_of_a_directory_leaves_nothing_open(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).touch()
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        before = num_open()
        found = files_in(fd, "aa", "bb")
        assert next(found).name in {"one", "two", "three"}
        assert num_open() == before
    finally:
        os.close(fd)
