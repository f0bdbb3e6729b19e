"""What a new user sees first."""

from __future__ import annotations

import re
from importlib import metadata

import pytest

from tests.cli.parts import ROOT, ucm

pytestmark = pytest.mark.process

SCREEN_LINES = 24


def commands() -> list[str]:
    return re.findall(r"^│ ([a-z][a-z-]*) ", ucm("--help").stdout, re.MULTILINE)


def test_all_commands_fit_a_screen() -> None:
    lines = ucm("--help").stdout.splitlines()
    assert len(lines) <= SCREEN_LINES and max(map(len, lines)) <= 80
    assert {"ls", "du", "inspect", "verify", "explain", "stat", "bench", "doctor"} < set(commands())


def test_the_version_is_told() -> None:
    done = ucm("--version")
    assert (done.returncode, done.stdout) == (0, f"ucm {metadata.version('ucm')}\n")


def test_every_tool_is_in_the_document_and_speaks_json() -> None:
    text = (ROOT / "docs" / "operating.md").read_text()
    for command in set(commands()) - {"node-cache", "init", "proxy"}:
        assert f"`ucm {command}`" in text, command
        assert "--json" in ucm(command, "--help").stdout, command
