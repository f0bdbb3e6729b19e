"""docs/metrics.md and the dashboard are checked against the code."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.documents.metric_names import labels_of, proxy_metrics, shown_as
from ucm.metrics import METRICS

ROOT = Path(__file__).parents[2]
_LINES = re.MULTILINE | re.DOTALL
TEXT = (ROOT / "docs" / "metrics.md").read_text()
DASHBOARD: dict[str, Any] = json.loads((ROOT / "examples" / "grafana" / "ucm.json").read_text())


def rows(heading: str) -> dict[str, list[str]]:
    """The cells of the table below `heading`, by what its first column names."""
    section = re.search(
        rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL
    )
    assert section is not None, f"no section {heading}"
    found = {}
    for line in re.findall(r"^\| `.*\|$", section[1], re.MULTILINE):
        first, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        name = first.strip("`")
        assert name not in found, f"{name} twice"
        found[name] = cells
    return found


def named(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


def test_it_has_every_metric_of_the_engine_and_no_other() -> None:
    assert rows("The engine's metrics").keys() == {shown_as(m) for m in METRICS.values()}


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
def test_it_names_the_kind_and_the_labels_of_a_metric(metric) -> None:
    kind, labels, meaning, remedy = rows("The engine's metrics")[shown_as(metric)]

    assert kind == metric.kind
    assert meaning.endswith(".") and remedy.endswith(".")
    values = {value for known in metric.labels.values() for value in known}
    expected = set(metric.labels) | (set() if "reason" in metric.labels else values)
    assert named(labels) == expected


@pytest.mark.parametrize("name", [shown_as(m) for m in METRICS.values() if "reason" in m.labels])
def test_it_explains_every_reason_and_no_other(name: str) -> None:
    (metric,) = (m for m in METRICS.values() if shown_as(m) == name)

    (heading,) = re.findall(rf"^## (Reasons of .*`{name}`.*)$", TEXT, re.MULTILINE)
    assert rows(heading).keys() == set(metric.labels["reason"])


def test_it_has_every_metric_of_the_proxy_and_no_other() -> None:
    shown = {
        name: (kind, named(labels)) for name, (kind, labels) in rows("The proxy's metrics").items()
    }

    assert len(shown) > 5
    assert shown == {name: (kind, set(labels)) for name, (kind, labels) in proxy_metrics().items()}


# -- the dashboard -------------------------------------------------------------------------


def panels() -> list[dict[str, Any]]:
    return list(DASHBOARD["panels"])


def expressions() -> Iterator[str]:
    for panel in panels():
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    asked = {name for text in expressions() for name in re.findall(r"\bucm_\w+", text)}

    assert len(asked) > 10
    assert asked <= labels_of().keys()


def test_the_dashboard_groups_and_filters_by_labels_that_the_metrics_have() -> None:
    known = labels_of()
    used = 0
    for text in expressions():
        names = re.findall(r"\bucm_\w+", text)
        wanted = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", text))
        for group in re.findall(r"\bby \(([^)]*)\)", text):
            wanted |= {label.strip() for label in group.split(",")}
        used += len(wanted)
        for name in names:
            assert wanted <= known[name], f"{text}: {name} has not all of {wanted}"
    assert used


def test_the_dashboard_takes_rates_of_counters_only_and_no_sums_of_what_a_node_shares() -> None:
    counters = {name for name in labels_of() if name.endswith(("_total", "_bucket", "_sum"))}
    counters |= {name for name in labels_of() if name.endswith("_count")}
    totals = {"ucm_tier_bytes", "ucm_tier_seconds", "ucm_node_evictions"}
    totals |= {"ucm_node_reclaimed_bytes", "ucm_node_refused_writes"}
    text = "\n".join(expressions())
    rated = set(re.findall(r"\b(?:rate|increase)\((ucm_\w+)", text))
    summed = set(re.findall(r"\bsum(?: by \([^)]*\))? \((?:rate\()?(ucm_\w+)", text))

    assert rated and summed
    assert rated <= counters | totals
    assert not {name for name in summed if name.startswith(("ucm_node_", "ucm_tier_"))}


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    """As far as it can be told from the file: panels of their own places, with a data source that
    whoever imports it chooses."""
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["title"] and DASHBOARD["uid"]
    (source,) = (v for v in DASHBOARD["templating"]["list"] if v["type"] == "datasource")
    assert (source["name"], source["query"]) == ("datasource", "prometheus")
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids) > 5
    for panel in panels():
        place = panel["gridPos"]
        assert 0 <= place["x"] and place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            refs = [target["refId"] for target in panel["targets"]]
            assert len(set(refs)) == len(refs) > 0
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels()], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, f"{one} lies over {other}"
