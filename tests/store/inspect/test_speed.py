"""What is measured has bounds of memory and of what it writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ucm.store.inspect import speed
from ucm.store.inspect.speed import ProbeLoad, SpeedTest, measure_all, own_folder

PAGE = 64 << 10


def test_threads_whose_pages_are_too_much_memory_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "MAX_MEMORY_BYTES", 8 * PAGE)
    found = measure_all(str(tmp_path), ProbeLoad(PAGE, 8 << 20, 0.1), on_progress=lambda a, b: None)
    assert {each.num_threads for each in found.speeds} == {1, 4}
    assert os.listdir(tmp_path) == []


def test_a_single_page_is_tried_whatever_memory_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "MAX_MEMORY_BYTES", PAGE // 2)
    assert SpeedTest(str(tmp_path), ProbeLoad(PAGE, 1 << 20, 0.1), (1, 4)).num_threads == [1]


def test_dd_copies_no_more_than_one_measurement_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def no_dd(folder: str, load: ProbeLoad) -> tuple[None, None]:
        asked.append(load.num_files)
        return None, None

    monkeypatch.setattr(speed, "dd_bytes_per_s", no_dd)
    # Of 16,384 files some are written in the time.
    load = ProbeLoad(PAGE, 1 << 30, 0.02)
    measure_all(str(tmp_path), load, on_progress=lambda a, b: None)
    assert asked[0] < load.num_files / 4


def test_a_page_is_no_zeros_and_of_any_length(tmp_path: Path) -> None:
    test = SpeedTest(str(tmp_path), ProbeLoad((1 << 20) + 4097, 4 << 20, 5.0), (1,))
    assert test.write(1).problem == "" and test.read(1).problem == ""
    path = next(tmp_path.iterdir())
    assert any(path.read_bytes()[-8192:-4096])


def test_who_is_interrupted_while_clearing_up_clears_up_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink, interrupts = os.unlink, iter([True])

    def interrupted_once(*args: Any, **more: Any) -> None:
        if next(interrupts, False):
            raise KeyboardInterrupt
        unlink(*args, **more)

    monkeypatch.setattr(os, "unlink", interrupted_once)
    with pytest.raises(KeyboardInterrupt), own_folder(str(tmp_path)) as folder:
        Path(folder, "page").write_bytes(b"page")
    assert list(tmp_path.iterdir()) == []
