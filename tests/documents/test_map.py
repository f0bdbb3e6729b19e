"""docs/map.md leads to files and rooms that are there, and README leads to it in one step."""

from __future__ import annotations

import re

from tests.documents.document_tables import quoted, table
from tests.source import ROOT


def test_every_sentence_leads_to_a_file() -> None:
    rows = table("map.md", "Where things are")
    named = [quoted(file)[0] for _, file in rows]

    assert len({sentence for sentence, _ in rows}) == len(rows) == 20
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_every_file_that_a_document_names_is_there() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    missing = {
        f"{document.name}: {name}"
        for document in documents
        for name in re.findall(
            r"(?<![/\w])(?:ucm|tests|examples|docs)/[\w/.-]+\.\w+", document.read_text()
        )
        if not (ROOT / name).exists()
    }
    assert missing == set()


def test_the_life_of_a_block_names_files_by_their_paths() -> None:
    """A name alone is to be found in two rooms, or soon will be."""
    text = (ROOT / "docs" / "life-of-a-block.md").read_text()

    assert len(re.findall(r"`ucm/[\w/]+\.py`", text)) > 50
    assert re.findall(r"`\w+\.py`", text) == []


def test_every_room_is_on_the_map_and_no_other() -> None:
    rooms = {f"{path.parent.relative_to(ROOT)}/" for path in (ROOT / "ucm").rglob("*.py")}
    without_files = {room for room in rooms if len(list((ROOT / room).glob("*.py"))) == 1}

    assert {quoted(room)[0] for room, _ in table("map.md", "Rooms")} == rooms - without_files


def test_the_file_that_serves_only_what_was_verified_is_two_steps_from_the_readme() -> None:
    read_on = (ROOT / "README.md").read_text().partition("## Read on")[2]
    first, second, *_ = [line for line in read_on.splitlines() if line.startswith("- ")]
    verified = [
        file for sentence, file in table("map.md", "Where things are") if "verified" in sentence
    ]

    assert "docs/life-of-a-block.md" in first and "docs/map.md" in second
    (file,) = verified
    assert "verified in this very read" in (ROOT / quoted(file)[0]).read_text()
