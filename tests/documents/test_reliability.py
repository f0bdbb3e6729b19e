"""docs/reliability.md has the matrix of faults that the suite goes through."""

from __future__ import annotations

from tests.matrix.all_phases import PHASES
from tests.matrix.cells import CELLS, OPERATIONS
from tests.matrix.document import generated, in_document


def test_its_table_is_that_of_the_matrix() -> None:
    assert in_document() == generated(), "run python -m tests.matrix.document"


def test_every_phase_of_the_matrix_can_be_run() -> None:
    assert PHASES.keys() == OPERATIONS.keys()
    assert len(set(map(str, CELLS))) == len(CELLS)
