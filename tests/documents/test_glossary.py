"""docs/glossary.md: each word once, and a file that has it."""

from __future__ import annotations

import re

import pytest

from tests.documents.document_tables import quoted, table
from tests.source import ROOT

SECTIONS = ("What is stored", "Where it is stored", "What is done", "Who talks to whom")


def rows() -> list[tuple[str, str]]:
    """Word and file. What stands together in a row is several words."""
    return [
        (word, quoted(file)[0])
        for section in SECTIONS
        for words, _, file in table("glossary.md", section)
        for word in words.split(", ")
    ]


def test_no_word_is_explained_twice() -> None:
    words = [word for word, _ in rows()]

    assert len(words) > 50
    assert [word for word in words if words.count(word) > 1] == []


def test_every_section_is_read() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()

    assert tuple(re.findall("^## (.*)$", text, re.MULTILINE)) == SECTIONS


@pytest.mark.parametrize(("word", "file"), rows())
def test_a_word_is_used_in_the_file_where_it_lives(word: str, file: str) -> None:
    """Or a name that is made of it: "hand-off" is `handoff` there, "write-back" `WriteBack`."""
    text = re.sub(r"[-_\s]", "", (ROOT / file).read_text()).lower()
    stem = re.sub(r"[-_\s]", "", word).lower().removesuffix("ed").removesuffix("e")

    assert stem in text
