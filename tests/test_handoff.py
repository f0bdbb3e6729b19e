"""The words of a hand-off, between versions of proxy and engines."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from ucm import handoff as h


class _OlderWanted(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="wanted"):
    """As engines have it that know of no answers."""


def test_an_engine_that_knows_of_no_answers_reads_a_wish_for_a_receipt() -> None:
    said = h.params(h.Wanted(with_answer=True))[h.NAME]

    assert msgspec.convert(said, _OlderWanted) == _OlderWanted()


def test_what_prefill_is_told_is_what_older_proxies_say() -> None:
    assert h.params(h.Wanted()) == {"ucm": {"kind": "wanted"}}
    assert h.parse({"ucm": {"kind": "wanted"}}) == h.Wanted(with_answer=False)


@pytest.mark.parametrize(
    "words", [{"kind": "wanted", "of_tomorrow": 1}, {"kind": "withdrawn", "of_tomorrow": [1]}]
)
def test_a_field_of_a_later_version_is_passed_over(words: dict[str, Any]) -> None:
    assert h.parse({"ucm": words}) is not None
    assert h.parse({"ucm": {"kind": "of_tomorrow"}}) is None


def test_every_word_is_read_as_it_was_said() -> None:
    some = "ab" * 32
    receipt = h.Receipt(namespace=some, block_tokens=128, tokens=129, key=some, issued_s=1.5)
    for word in (h.Wanted(), h.Wanted(with_answer=True), receipt, h.Expected(), h.Withdrawn()):
        assert h.parse(h.params(word)) == word
