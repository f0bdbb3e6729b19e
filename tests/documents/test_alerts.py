"""examples/alerts.yml: Prometheus takes it, it asks for what there is, and each rule fires."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from tests.documents.metric_names import labels_of
from ucm.metrics import METRICS

ROOT = Path(__file__).parents[2]
FIRE = Path(__file__).with_name("alerts_fire.yml")
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((ROOT / "examples" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])


def parts(expr: Any) -> Iterator[Any]:
    """Everything in an expression that has a name of its own."""
    yield expr
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        if hasattr(expr, name):
            yield from parts(getattr(expr, name))
    for each in getattr(expr, "args", ()):
        yield from parts(each)


def parsed(rule: dict[str, Any]) -> list[Any]:
    return list(parts(promql.parse(rule["expr"])))


@every_rule
def test_a_rule_asks_for_metrics_labels_and_values_that_exist(rule: dict[str, Any]) -> None:
    known = labels_of()
    selectors = [each for each in parsed(rule) if isinstance(each, promql.VectorSelector)]
    assert selectors
    for each in selectors:
        if each.name == "vllm:prompt_tokens_total":
            continue
        assert each.name in known
        metric = METRICS.get(each.name) or METRICS.get(each.name.removesuffix("_total"))
        for matcher in each.matchers.matchers:
            assert matcher.name in known[each.name]
            if metric is not None and matcher.name in metric.labels:
                assert set(matcher.value.split("|")) <= set(metric.labels[matcher.name])
    for each in parsed(rule):
        if isinstance(each, promql.AggregateExpr):
            names = [one.name for one in parts(each) if isinstance(one, promql.VectorSelector)]
            wanted = set(each.modifier.labels if each.modifier else ())
            assert all(wanted <= known[name] for name in names if name in known)


@every_rule
def test_a_rule_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"] and rule["annotations"]["description"].endswith(".")


@every_rule
def test_every_rule_is_tried(rule: dict[str, Any]) -> None:
    assert f'alertname="{rule["alert"]}"' in FIRE.read_text()


def test_rules_fire_on_what_they_are_about_and_are_silent_before() -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("there is no promtool, which comes with Prometheus")
    subprocess.run([tool, "test", "rules", str(FIRE)], check=True)
