"""`make test` leaves no test out, runs none twice, and stops where something is red."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests import stages

MARKS = ("process", "alone", "gpu", "vllm")


@pytest.mark.parametrize("present", list(itertools.product([False, True], repeat=len(MARKS))))
def test_every_test_is_in_one_stage_whatever_its_marks(present: tuple[bool, ...]) -> None:
    marked = dict(zip(MARKS, present, strict=True))
    found = [each.name for each in stages.stages(2) if eval(each.marks, {}, marked)]  # noqa: S307
    assert len(found) == 1


def test_the_files_of_a_stage_are_those_that_spell_one_of_its_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    texts = {
        "test_plain.py": "",
        "test_process.py": "pytest.mark.process",
        "gpu/test_device.py": "",
    }
    for name, text in texts.items():
        (tmp_path / "tests" / name).write_text(text)
    unit, process, _, vllm = stages.stages(2)

    def names(stage: stages.Stage) -> set[str]:
        return {name.removeprefix("tests/") for name in stages.files_of(stage)}

    assert names(unit) == texts.keys()
    assert names(process) == {"test_process.py"}
    assert names(vllm) == {"gpu/test_device.py"}


def test_red_in_one_stage_keeps_the_next_from_starting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def run(command: list[str], counts: Path) -> int:
        asked.append(command[command.index("-m", 3) + 1])
        counts.write_text('{"passed": 3, "failed": 1}')
        return len(asked) - 1

    monkeypatch.setattr(stages, "run", run)
    assert stages.main("short", ["-k", "anything"]) == 1
    assert len(asked) == 2
    said = capsys.readouterr().out.splitlines()
    assert said[-1].split() == ["vllm", "not", "started"]
    assert said[-3].split()[:2] == ["process", "RED"] and "1 failed" in said[-3]


def test_where_no_test_was_found_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "run", lambda command, counts: stages.NOTHING_COLLECTED)
    assert stages.main("short", ["-k", "none"]) == stages.NOTHING_COLLECTED


def test_arguments_reach_pytest_and_marks_of_ones_own_take_the_place_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(stages, "run", lambda command, counts: asked.append(command) or 0)
    assert stages.main("long", ["-m", "fuzz or long", "--durations=3"]) == 0
    assert all("--durations=3" in command for command in asked)
    assert all(command[4].endswith(") and (fuzz or long)") for command in asked)


def test_files_that_are_named_are_told_from_other_arguments() -> None:
    assert stages.names_files(["-x", "tests/test_stages.py::test_a"])
    assert not stages.names_files(["-k", "stages", "--durations", "5"])
