"""What handoff.py measures with which model, and whose servers it starts for that."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import contenders
from benchmarks.handoff import MODEL_OF, chosen_of, parts_by_model


def test_hits_are_measured_with_mid_and_all_else_with_small() -> None:
    assert parts_by_model(list(MODEL_OF), None) == {
        "small": ["latency", "race", "pace"],
        "mid": ["hit"],
    }


def test_a_model_that_is_asked_for_is_that_of_every_part() -> None:
    assert parts_by_model(["race", "hit"], "small") == {"small": ["race", "hit"]}


@pytest.mark.parametrize(("parts", "with_slow"), [(["hit"], False), (["race", "hit"], True)])
def test_slower_files_are_started_only_for_parts_that_measure_them(
    parts: list[str], with_slow: bool, tmp_path: Path
) -> None:
    everybody = contenders.contenders(tmp_path, tmp_path / "slow")
    chosen = chosen_of(everybody, parts, Namespace(only="", slow_peers=True))
    assert any(each.is_slow for each in chosen) is with_slow
    assert {each.name for each in chosen if not each.is_slow} >= {"ucm-dram", "example", "fs"}


def test_who_is_named_is_not_started_for_parts_without_them() -> None:
    everybody = contenders.contenders(Path("warm"), Path("slow"))
    named = Namespace(only="ucm-files,ucm-files-slow", slow_peers=False)
    assert [each.name for each in chosen_of(everybody, ["hit"], named)] == ["ucm-files"]
