"""Tables of the documents, as tests read them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def table(document: str, heading: str) -> list[list[str]]:
    """The cells of the rows of the one table below `heading` in docs/, without its head."""
    text = (ROOT / "docs" / document).read_text()
    section = re.search(
        rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL
    )
    assert section is not None, f"docs/{document}: no section {heading}"
    lines = re.findall(r"^\|.*\|$", section[1], re.MULTILINE)
    assert len(lines) > 2, f"docs/{document}: no table below {heading}"
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]


def quoted(cell: str) -> list[str]:
    """What stands between backquotes in a cell."""
    return re.findall(r"`([^`]+)`", cell)
