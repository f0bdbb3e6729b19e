"""Commands of ucm that documents show have flags that ucm takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from tests.source import ROOT
from ucm.cli.main import app

DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("examples/**/*.md")]
_COMMAND = re.compile(r"\bucm (?P<name>[a-z][a-z-]*)(?P<rest>[^`|#\n]*)")
_FLAG = re.compile(r"(?<!\S)--[a-z][a-z-]*")
# It has a parser of its own.
_OTHERS = {"proxy"}


def flags_of(name: str) -> set[str]:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    taken = {flag for each in command.params for flag in (*each.opts, *each.secondary_opts)}
    return {*taken, "--help"}


def shown(text: str) -> Iterator[tuple[str, str]]:
    """Each subcommand with one of its flags. Behind ` -- ` stand an engine's."""
    known = typer.main.get_command(app).commands.keys()  # type: ignore[attr-defined]
    for found in _COMMAND.finditer(text):
        if found["name"] in known - _OTHERS:
            for flag in _FLAG.findall(found["rest"].partition(" -- ")[0]):
                yield found["name"], flag


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_of_a_shown_command_is_taken(path: Path) -> None:
    unknown = {
        f"ucm {name} {flag}" for name, flag in shown(path.read_text()) if flag not in flags_of(name)
    }
    assert unknown == set()


def test_flags_are_found_in_lines_and_in_sentences() -> None:
    text = "try `ucm doctor DIR --peer-mount B` first\n    $ ucm ls /mnt/kv --json -- --model m\n"
    assert list(shown(text)) == [("doctor", "--peer-mount"), ("ls", "--json")]
