"""The table of docs/reliability.md, as the matrix has it. `python -m tests.matrix.document` writes
it there; a test tells when that was forgotten."""

from __future__ import annotations

import re
from pathlib import Path

from tests.matrix.cells import CELLS, FAULTS, OPERATIONS

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
_PART = re.compile(r"(?<=<!-- made by tests/matrix -->\n).*?(?=<!-- end -->)", re.DOTALL)


def table() -> str:
    """What each fault costs, by what was done and at which operation of the filesystem."""
    costs = {(cell.phase, cell.operation, cell.fault): cell.costs for cell in CELLS}
    head = ["while", "operation", *FAULTS]
    rows = [
        [phase, operation, *(costs.get((phase, operation, fault), "") for fault in FAULTS)]
        for phase, operations in OPERATIONS.items()
        for operation in operations
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n".replace("  ", " ") for line in lines)


def faults() -> str:
    return "".join(f"* {name}: {what}.\n" for name, what in FAULTS.items() if what)


def generated() -> str:
    return f"\n{faults()}\n{table()}\n"


def in_document() -> str:
    found = _PART.search(DOCUMENT.read_text())
    assert found is not None, f"{DOCUMENT}: the marks around the table are missing"
    return found[0]


if __name__ == "__main__":
    text = DOCUMENT.read_text()
    DOCUMENT.write_text(_PART.sub(lambda _: generated(), text))
