"""docs/operating.md shows what this version does."""

from __future__ import annotations

import re
from pathlib import Path

from ucm.config.node_socket import NODE_PROTOCOL

DOCS = Path(__file__).parents[2] / "docs"


def test_sockets_that_documents_show_are_of_this_version() -> None:
    shown = [
        (path.name, int(version))
        for path in DOCS.glob("*.md")
        for version in re.findall(r"\.v(\d+)\.sock", path.read_text())
    ]
    assert ("operating.md", NODE_PROTOCOL) in shown
    assert {version for _, version in shown} == {NODE_PROTOCOL}


def test_a_new_users_steps_need_nothing_that_a_later_one_makes() -> None:
    install = (DOCS / "operating.md").read_text().split("## Install")[1].split("## ")[0]
    steps = dict(re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |\Z)", install, re.MULTILINE | re.DOTALL))
    order = ["Mount the filesystem", "`ucm init DIR`", "Write the YAML", "`ucm doctor CONFIG`"]
    assert [steps[str(number)].startswith(word) for number, word in enumerate(order, 1)] == [
        True
    ] * 4
