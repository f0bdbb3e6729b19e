"""What answers.py counts as a gap between tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import answers


def _answer(*arrived_s: float) -> SimpleNamespace:
    return SimpleNamespace(arrived_s=arrived_s)


def test_gaps_count_while_all_answers_are_under_way_and_say_which_token_ends_them() -> None:
    early, late = _answer(0.0, 1.0, 2.0, 4.0, 5.0), _answer(1.0, 2.5, 4.0, 7.0)

    found = list(answers._gaps([early, late]))  # type: ignore[list-item]

    # Of the early one what begins behind the late one's first token, and ends before its own last.
    assert found == [(3, 2000.0), (4, 1000.0), (2, 1500.0)]


def test_a_ratio_is_shown_with_the_quartiles_around_it() -> None:
    assert answers.quartiles([1.0, 1.1, 1.2, 1.3, 1.4]) == "1.200 (1.100 to 1.300)"


def test_engines_are_compared_with_one_without_a_connector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["answers.py", "--only", "true,plain"])
    with pytest.raises(SystemExit):
        answers.arguments()


def test_storing_is_compared_with_no_connector_and_with_not_storing() -> None:
    found = answers.Found()
    for name, gap_ms in (("plain", 2.0), ("false", 2.5), ("true", 3.0)):
        found.rounds[name] = [answers.Round([gap_ms], [], {"worker": 1.0, "engine": 1.0})]

    assert dict(answers.aims(found)) == {
        "false to plain": 1.25,
        "true to plain": 1.5,
        "true to false": 1.2,
    }
