"""docs/scale.md is checked against the model that it tells of."""

from __future__ import annotations

import re

from benchmarks.fleet_run import TOKEN_BYTES, TOKENS_PER_S
from benchmarks.fleet_world import KINDS
from benchmarks.request_trace import BLOCK_TOKENS
from tests.documents.document_tables import quoted, table
from tests.source import ROOT

TEXT = (ROOT / "docs" / "scale.md").read_text()


def test_it_has_figures_of_every_kind_of_operation() -> None:
    names = [quoted(name)[0] for name, *_ in table("scale.md", "A fleet") if quoted(name)]

    assert names == list(KINDS)


def test_its_figures_by_kind_add_up_to_those_of_one_request() -> None:
    rows = {name: cells for name, *cells in table("scale.md", "A fleet")}
    for column, said in enumerate(rows["of one request"]):
        operations = sum(float(rows[f"`{kind}`"][column]) for kind in KINDS)
        assert abs(operations - float(said)) < 0.1, column
    # By its own words a node has 0.1 requests a second; a run has a beginning and an end.
    for column, nodes in ((0, 4), (1, 4), (2, 40), (3, 40), (4, 400), (5, 400)):
        all_of_them = float(rows["of one request"][column]) * nodes * 0.1
        assert abs(all_of_them / float(rows["metadata operations/s"][column]) - 1) < 0.05, column


def test_what_it_says_of_pages_and_engines_is_what_the_model_has() -> None:
    page_mib = BLOCK_TOKENS * TOKEN_BYTES >> 20

    assert f"{TOKEN_BYTES >> 10} KiB\nof KV a token, so pages of {page_mib} MiB" in TEXT
    assert f"{TOKENS_PER_S:,.0f} tokens a second" in TEXT


def test_the_readme_and_the_benchmark_lead_to_it() -> None:
    assert "`docs/scale.md`" in (ROOT / "README.md").read_text().partition("## Read on")[2]
    assert re.search(r"^    \.venv/bin/python benchmarks/fleet\.py --trace", TEXT, re.MULTILINE)
