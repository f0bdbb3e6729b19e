"""docs/models.md says of models what the code says."""

from __future__ import annotations

import re

import pytest

from tests.documents.document_tables import ROOT, quoted, table
from tests.documents.messages import messages
from tests.e2e.hybrid_models import MODELS
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.engine.facts import StrandFacts
from ucm.integration.engine.strand_report import strands_text
from ucm.integration.vllm import kv_specs
from ucm.store.blocks.page_layout import PageGeometry
from ucm.store.blocks.strands import Reach, ReachKind, default_interval_tokens

TEXT = (ROOT / "docs" / "models.md").read_text()


def tables(heading: str) -> list[list[list[str]]]:
    """The rows of all tables below a heading, without their heads."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", section, re.MULTILINE):
        lines = block.splitlines()[2:]
        found.append([[cell.strip() for cell in line[1:-1].split("|")] for line in lines])
    return found


def test_it_names_the_models_that_are_tried_and_no_other() -> None:
    tried = [name for *_, cell in table("models.md", "Families") for name in quoted(cell)]
    assert sorted(tried) == sorted(MODELS)


def test_it_has_every_reach() -> None:
    rows = re.findall(r"^\| `(all|window|chunk)[^`]*` \|", TEXT, re.MULTILINE)
    assert rows == [kind.value for kind in ReachKind]


def test_it_says_of_layers_that_are_refused_what_the_engine_says() -> None:
    of_specs, _ = tables("Refused")
    said = {kind: (what, why) for kind, what, why in of_specs}
    refused = {f"`{kind}`": sentence for kind, sentence in kv_specs._REFUSED.items()}
    assert said == {
        **refused,
        "`MLAAttentionSpec`": kv_specs._INDEXER,
        "any other": kv_specs._OTHER,
    }


def test_the_sentences_that_it_quotes_are_those_of_the_code() -> None:
    _, of_engines = tables("Refused")
    quotes = [quoted(cell)[-1] for _, cell in of_engines]
    quotes += re.findall(r"`(this model has [^`]*)`$", TEXT, re.MULTILINE)
    assert len(quotes) == len(of_engines) + 1
    assert set(quotes) <= messages().keys()


@pytest.mark.parametrize("row", table("models.md", "What it takes"), ids=lambda row: row[0])
def test_what_a_model_takes_is_what_an_engine_would_say(row: list[str]) -> None:
    _, shape, per_token, by_default, ends_only = row
    (heads, size), strands = re.findall(r"(\d+) heads of (\d+)", shape)[0], []
    for kind, num_tokens, num_layers in re.findall(r"`(\w+) ?(\d*)`: (\d+) layers", shape):
        geometry = PageGeometry(
            num_layers=int(num_layers),
            num_kv_heads=int(heads),
            block_tokens=128,
            k_size=int(size),
            v_size=int(size),
            item_bytes=2,
        )
        reach = Reach(ReachKind(kind), int(num_tokens or 0))
        strands.append(StrandFacts("", reach, geometry, LayoutKind.PACKED, "", ()))
    token_bytes = sum(each.geometry.page_bytes for each in strands) // 128
    assert per_token == f"{token_bytes // 1024} KiB"
    for interval, cell in ((None, by_default), (0, ends_only)):
        written, percentage = cell.split(", ")
        said = f"writes {written} per 1000 tokens, {percentage} of its KV"
        assert said in strands_text(strands, interval)


def test_the_default_distance_of_boundaries_is_that_of_the_code() -> None:
    assert default_interval_tokens([Reach(ReachKind.WINDOW, 1024)]) == 2048
    assert default_interval_tokens([Reach(ReachKind.WINDOW, 4096)]) == 2 * 4096
    assert "by default 2048, or twice the longest window or chunk where that is more" in TEXT
