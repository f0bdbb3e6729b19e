"""What a node remembers of blocks that it was asked for, and the scores that follow from it."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.store.blocks.keys import Key
from ucm.store.tiers.posix.recall import Pauses, Recall, _digest
from ucm.store.tiers.posix.score import MAX_SPAN_NS, MAX_USES, MIN_SPAN_NS, SECOND_NS

BEGIN_NS = 1_700_000_000 * SECOND_NS
# A prompt is a way down a tree: each block has those before it in its name.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(
    lambda turns: [_key("".join(map(str, turns[: i + 1]))) for i in range(len(turns))]
)


def _key(name: str) -> Key:
    return Key(sha256(name.encode()).digest())


def _unrelated(name: str, number: int) -> list[Key]:
    return [_key(f"{name}{i}") for i in range(number)]


@given(st.lists(prompts, max_size=30))
def test_uses_outlive_pages(asked: list[list[Key]]) -> None:
    """A block has the score of as many uses as it was asked for, whether it is there or not."""
    recall, counts, now_ns = Recall(1 << 16), Counter[Key](), BEGIN_NS
    for prompt in asked:
        now_ns += 10 * SECOND_NS
        recall.use(prompt, now_ns)
        counts.update(prompt)
        by_uses = sorted(prompt, key=lambda key: (counts[key], recall.first_score_ns(key, now_ns)))
        by_score = sorted(prompt, key=lambda key: recall.first_score_ns(key, now_ns))
        assert by_uses == by_score
        for key in prompt:
            is_later = recall.first_score_ns(key, now_ns) > now_ns
            assert is_later == (counts[key] > 1)


@given(st.lists(prompts, max_size=60), st.sampled_from([2, 8, 32]))
def test_scores_do_not_rise_along_a_prompt_though_some_of_it_was_forgotten(
    asked: list[list[Key]], num_keys: int
) -> None:
    """Else what is kept had gaps, and nothing behind a gap is found."""
    recall = Recall(num_keys)
    for number, prompt in enumerate(asked):
        now_ns = BEGIN_NS + number * 2 * SECOND_NS
        recall.use(prompt, now_ns)
        known = [key for key in prompt if recall._find(_digest(key)) is not None]
        first = [recall.first_score_ns(key, now_ns) for key in known]
        used = [recall.used_score_ns(key, 0, now_ns) or 0 for key in known]
        assert first == sorted(first, reverse=True)
        assert used == sorted(used, reverse=True)


def test_a_prompt_that_is_asked_for_twice_at_once_is_used_once() -> None:
    recall, prompt = Recall(16), [_key("a")]
    recall.use(prompt, BEGIN_NS)
    once = recall.first_score_ns(prompt[0], BEGIN_NS)
    recall.use(prompt, BEGIN_NS + SECOND_NS // 2)
    assert recall.first_score_ns(prompt[0], BEGIN_NS) == once
    recall.use(prompt, BEGIN_NS + 2 * SECOND_NS)
    assert recall.first_score_ns(prompt[0], BEGIN_NS) > once


def test_a_clock_that_is_set_back_stops_no_counting() -> None:
    recall, prompt = Recall(16), [_key("a")]
    recall.use(prompt, BEGIN_NS)
    recall.use(prompt, BEGIN_NS - 3600 * SECOND_NS)
    assert recall.first_score_ns(prompt[0], BEGIN_NS) > BEGIN_NS


def test_what_was_asked_for_longest_ago_is_forgotten_first() -> None:
    """A memory of two, and three keys."""
    recall, (first, second, third) = Recall(2), _unrelated("k", 3)
    for number, key in enumerate((first, second, first, third)):
        recall.use([key], BEGIN_NS + number * 10 * SECOND_NS)
    now_ns = BEGIN_NS + 60 * SECOND_NS
    assert recall.first_score_ns(first, now_ns) > now_ns
    for key in (second, third):
        recall.use([key], now_ns)
    assert recall.first_score_ns(third, now_ns) > now_ns > recall.first_score_ns(second, now_ns)


def test_much_that_is_new_behind_a_little_that_is_known_goes_before_a_new_prompt() -> None:
    """Many texts behind one template: hardly any of them comes back."""
    recall, template = Recall(1 << 16), _unrelated("template", 2)
    recall.use(template, BEGIN_NS)
    now_ns = BEGIN_NS + 10 * SECOND_NS
    text, turn, other = _unrelated("text", 6), _unrelated("turn", 2), _unrelated("other", 8)
    recall.use(template + text, now_ns)
    recall.use(template + turn, now_ns)
    recall.use(other, now_ns)
    last_of_text, last_of_turn = (recall.first_score_ns(k[-1], now_ns) for k in (text, turn))
    assert last_of_text < recall.first_score_ns(other[-1], now_ns)
    assert last_of_turn >= recall.first_score_ns(other[3], now_ns)


def test_a_block_is_counted_only_so_far() -> None:
    recall, prompt = Recall(16), [_key("a")]
    now_ns = BEGIN_NS
    for _ in range(2 * MAX_USES):
        now_ns += 2 * SECOND_NS
        recall.use(prompt, now_ns)
    assert now_ns < recall.first_score_ns(prompt[0], now_ns) <= now_ns + 9 * MAX_SPAN_NS


@pytest.mark.parametrize("pause_s", [0.5, 2, 60, 3600, 48 * 3600])
def test_the_span_becomes_the_pause_that_is_seen(pause_s: float) -> None:
    """At most a sixteenth of a doubling off, within what a span may be."""
    pauses = Pauses()
    for _ in range(4000):
        pauses.add(int(pause_s * SECOND_NS))
    pauses.settle()
    expected_ns = min(max(pause_s * SECOND_NS, MIN_SPAN_NS), MAX_SPAN_NS)
    assert pauses.span_ns == pytest.approx(expected_ns, rel=0.05)


def test_a_span_follows_when_pauses_change() -> None:
    pauses = Pauses()
    for pause_s in (600, 20):
        for _ in range(3 << 20):
            pauses.add(pause_s * SECOND_NS)
            if pauses._num > 1 << 20:
                pauses.settle()
    pauses.settle()
    assert pauses.span_ns == pytest.approx(20 * SECOND_NS, rel=0.05)
