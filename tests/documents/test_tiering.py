"""docs/tiering.md is checked against the code."""

from __future__ import annotations

from tests.documents.document_tables import quoted, table
from tests.documents.metric_names import shown_as
from ucm.config.settings import VOCABULARY
from ucm.integration.tiering.counts import TIERING_METRICS
from ucm.metrics import METRICS

OWN = {name: metric for name, metric in TIERING_METRICS.items() if name not in METRICS}


def test_it_has_every_metric_of_the_tier_with_its_kind_and_labels_and_no_other() -> None:
    rows = {quoted(name)[0]: cells for name, *cells in table("tiering.md", "What to watch")}

    assert len(OWN) > 5
    assert rows.keys() == {shown_as(metric) for metric in OWN.values()}
    for metric in OWN.values():
        kind, labels, meaning = rows[shown_as(metric)]
        values = {value for known in metric.labels.values() for value in known}
        expected = set(metric.labels) | (set() if "reason" in metric.labels else values)
        assert (kind, set(quoted(labels))) == (metric.kind, expected)
        assert meaning.endswith(".")


def test_the_bounds_that_it_names_are_settings() -> None:
    text = " ".join(cell for row in table("tiering.md", "What it does") for cell in row)
    bounds = {name for name in quoted(text) if name.endswith("_timeout_ms")}

    assert bounds == {"handoff_timeout_ms", "expect_timeout_ms"}
    assert bounds <= set(VOCABULARY.used["top"])
