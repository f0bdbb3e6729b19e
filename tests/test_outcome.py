"""Every end of a lookup has a word in every count of such ends."""

from __future__ import annotations

import pytest

from ucm.metrics import METRICS
from ucm.outcome import MISSED, RECOMPUTED, UNWRITTEN, Outcome, missed_as, recomputed_as


@pytest.mark.parametrize("outcome", Outcome)
def test_whatever_ends_a_lookup_is_counted_under_a_word_that_the_metric_has(
    outcome: Outcome,
) -> None:
    for metric, word in (
        ("ucm_lookup_missed_blocks", missed_as(outcome)),
        ("ucm_handoff_recomputed_tokens", recomputed_as(outcome)),
    ):
        assert word.value in METRICS[metric].labels["reason"]


def test_a_word_that_a_count_has_is_counted_as_itself() -> None:
    assert list(MISSED) == [missed_as(outcome) for outcome in MISSED]
    assert list(RECOMPUTED) == [recomputed_as(outcome) for outcome in RECOMPUTED]


def test_every_word_is_one_that_some_count_has_or_is_translated_by_name() -> None:
    counted = {*MISSED, *RECOMPUTED, *UNWRITTEN}
    assert {Outcome.FINE, Outcome.GONE} == set(Outcome) - counted


@pytest.mark.parametrize("outcome", Outcome)
def test_a_word_is_written_as_its_value(outcome: Outcome) -> None:
    assert outcome.value == str(outcome) == f"{outcome}"
    assert bool(outcome) is (outcome is not Outcome.FINE)
