"""docs/troubleshooting.md names every message that a user can meet, and no other."""

from __future__ import annotations

import re

import pytest

from tests.documents.messages import ROOT, messages
from ucm.pd import flags, register

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text()
# Of vLLM's server, whose flags are not ours to know.
_OF_ENGINES = {
    "--attention-backend",
    "--block-size",
    "--calculate-kv-scales",
    "--enable-dbo",
    "--enable-prompt-tokens-details",
    "--kv-cache-dtype",
    "--hicache-storage-backend",
    "--kv-transfer-config",
    "--load-format",
    "--ubatch-size",
}
_ROW = re.compile(r"^\| (`+) ?(.*?) ?\1 \| (.*) \| (.*) \|$", re.MULTILINE)


def rows() -> list[tuple[str, str, str]]:
    """Message, cause, fix."""
    return [(message, cause, fix) for _, message, cause, fix in _ROW.findall(TEXT)]


def test_every_message_of_the_code_is_explained() -> None:
    explained = {message for message, _, _ in rows()}
    missing = {text: places for text, places in messages().items() if text not in explained}
    assert not missing, "\n".join(f"{text}   {places}" for text, places in missing.items())


def test_every_message_that_is_explained_can_be_met() -> None:
    stale = {message for message, _, _ in rows()} - messages().keys()
    assert not stale, "\n".join(stale)


def test_no_message_is_explained_twice() -> None:
    names = [message for message, _, _ in rows()]
    assert len(names) == len(set(names)), [name for name in names if names.count(name) > 1]


def test_every_table_row_is_one_that_the_other_tests_read() -> None:
    lines = [line for line in TEXT.splitlines() if line.startswith("| `")]
    assert len(lines) == len(rows())


def test_the_flags_that_are_to_help_exist() -> None:
    parsers = (flags._parser(""), register._parser())
    ours = {
        name for parser in parsers for action in parser._actions for name in action.option_strings
    }
    for path in (ROOT / "ucm" / "cli").glob("*.py"):
        ours |= set(re.findall(r"--[a-z][a-z-]*", path.read_text()))
    named = {name for _, _, fix in rows() for name in re.findall(r"(?<![\w-])--[a-z][a-z-]*", fix)}

    assert "--max-queued" in named
    assert set() == named - ours - _OF_ENGINES


@pytest.mark.parametrize(
    "message",
    [
        "can't be read",
        "no node cache: …",
        "timed out after … s, waiting for …",
        "it takes too long to start",
        "can't be moved aside: …",
        "…: …: not used by store_pipeline …",
        "one page takes … bytes and the node cache has …: raise cache_buffer_capacity_gb",
        "room in the node cache: storage is slow, or the cache is small",
        "write failed …: …",
    ],
)
def test_messages_are_found_in_the_source(message: str) -> None:
    """The reader of the source sees what is raised, what is logged, and what either is put together
    of."""
    assert message in messages()
