"""docs/pd.md is checked against the code."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ucm import handoff
from ucm.pd import access, administration, app, protocol, register
from ucm.pd.flags import AFFINITIES, HANDOFFS, ProxySettings, _parser
from ucm.pd.fleet.affinity import OUTCOMES
from ucm.pd.legs import delivery, prefill, rewrite, upstream
from ucm.pd.legs import prefill_promise as legs_handoff
from ucm.pd.metrics import ProxyMetrics

TEXT = (Path(__file__).parents[2] / "docs" / "pd.md").read_text()
# All of the proxy's code.
CODE = [
    node
    for file in sorted(Path(app.__file__).parent.rglob("*.py"))
    for node in ast.walk(ast.parse(file.read_text()))
]
# In code, the part of a text that is put in when it runs.
ANY = "\0"


def named() -> set[str]:
    """All that stands between backticks."""
    return set(re.findall(r"`([^`\n]+)`", TEXT))


def texts(value: ast.AST | None) -> Iterator[str]:
    """What an expression can be: of a choice both sides, not its condition."""
    if isinstance(value, ast.IfExp):
        yield from texts(value.body)
        yield from texts(value.orelse)
    elif isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value
    elif isinstance(value, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else ANY for part in value.values)
        yield "".join(map(str, parts))


def tree(function: Any) -> list[ast.AST]:
    return list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))))


def assigned(nodes: Iterable[ast.AST], name: str) -> set[str]:
    """Texts that `name`, or an attribute of that name, is set to."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            all_targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            targets = [getattr(each, "attr", getattr(each, "id", "")) for each in all_targets]
            if name in targets:
                found.update(texts(node.value))
    return found


def returned(function: Callable[..., object]) -> set[str]:
    returns = (node for node in tree(function) if isinstance(node, ast.Return))
    return {text for each in returns for text in texts(each.value)}


def first_arguments(nodes: Iterable[ast.AST], name: str) -> set[str]:
    """Texts with which `name`, or something's method of that name, is called."""
    calls = (node for node in nodes if isinstance(node, ast.Call) and node.args)
    return {
        text
        for call in calls
        if getattr(call.func, "attr", getattr(call.func, "id", "")) == name
        for text in texts(call.args[0])
    }


def test_it_names_every_flag_and_no_other() -> None:
    # The registrar is another command, with flags of its own; so is vLLM's server.
    others = {"--enable-prompt-tokens-details"}
    others |= {each for a in register._parser()._actions for each in a.option_strings}
    parser = _parser("")
    flags = {name for action in parser._actions for name in action.option_strings}

    assert set() == (flags | others) - named()
    assert set() == set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT)) - flags - others


def test_it_gives_the_defaults_of_the_code() -> None:
    """Those of the parser; a flag without a value has none to show."""
    of_registrar = [
        a for a in register._parser()._actions if a.dest in ("lease_ttl_s", "interval_s")
    ]
    for action in [*_parser("")._actions, *of_registrar]:
        default = action.default
        if action.nargs == 0 or default is None:
            continue
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        assert f"| `{action.option_strings[0]}` | {shown} |" in TEXT


def test_it_names_every_metric_and_no_other() -> None:
    lines = ProxyMetrics(lambda: ()).text().decode().splitlines()
    kinds = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    metrics = {name for name in kinds if not name.endswith("_created")}

    assert metrics
    assert metrics == {name for name in named() if name.startswith("ucm_pd_")}


def test_it_names_every_path() -> None:
    paths = {path for path in assigned(CODE, "path") if re.fullmatch("[a-z-]+", path)}

    assert {"pd", "decode-only", "skip-short", "shared-prefill", "mixed"} <= paths
    for path in paths:
        assert f"\n| `{path}` | " in TEXT


def test_it_names_every_reason_for_which_a_request_is_not_prefilled() -> None:
    reasons = returned(rewrite.why_not_prefill) | returned(upstream.failure_reason)
    reasons |= assigned(tree(prefill), "failure")
    reasons |= first_arguments(CODE, "PrefillOutcome")
    reasons |= first_arguments(CODE, "not_prefilled")
    assert {"about_prompt", "refused", "queue_full", "no_prefiller", f"{ANY}xx"} <= reasons
    assert "cancelled" in reasons
    rows = TEXT[TEXT.index("| reason of ") :]

    for reason in reasons:
        for name in (reason.replace(ANY, digit) for digit in "345"):
            assert re.search(rf"^\| [^|]*`{name}`[^|]* \|", rows, re.MULTILINE), name


def test_it_names_every_way_to_fail() -> None:
    ways = first_arguments(CODE, "failed") | assigned(CODE, "_failure")
    ways |= set(delivery._FAILURES.values())
    assert {"unreachable", "broken_off", "client_left"} <= ways

    assert set() == ways - named()


def test_it_names_every_field_that_the_prefill_leg_changes() -> None:
    fields = {*rewrite._DROPPED, *rewrite._ONE_IF_GIVEN, *rewrite._ABOUT_THE_PROMPT}

    assert set() == fields - named()


def test_it_says_when_decode_is_asked_and_what_it_is_told() -> None:
    for mode in HANDOFFS:
        assert f"\n| `{mode}` | " in TEXT
    wanted = (handoff.Wanted(), handoff.Wanted(with_answer=True))
    for mark in (*wanted, handoff.Expected(), handoff.Withdrawn()):
        assert json.dumps(handoff.params(mark)) in named()
    assert legs_handoff.WITHDRAWN_SUFFIX in named()


def test_it_names_what_may_come_of_affinity() -> None:
    assert set() == {*AFFINITIES, *OUTCOMES} - named()


def test_it_names_every_endpoint() -> None:
    assert set() == {path for path in protocol.GENERATING if path not in TEXT}
    routes = app.make_app(ProxySettings()).router.resources()
    for route in {route.canonical for route in routes} - set(protocol.GENERATING):
        for path in re.findall(r"^/[a-z]+$", route):
            assert f"`GET {path}`" in TEXT
    for change in ("add", "drain", "remove"):
        assert f"`POST /instances/{change}`" in TEXT


def test_it_names_what_is_for_the_admin_alone() -> None:
    assert set() == (administration.PATHS | administration.FOR_ANYBODY) - named()
    assert access.ADMIN_HEADER in named()
