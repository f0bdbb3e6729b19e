"""docs/sglang.md and the table of engines say what the code takes and the tests run."""

from __future__ import annotations

import json
import re

from tests.documents.document_tables import ROOT, quoted, table
from tests.integration.sglang.instances import CLASS
from tests.integration.sglang.recorded import VERSION
from ucm.config.settings import Settings, load_settings_file
from ucm.integration.sglang.extra_config import settings_of
from ucm.integration.sglang.identity import LAYOUTS
from ucm.integration.sglang.page_store import MAX_CALL_S

TEXT = (ROOT / "docs" / "sglang.md").read_text()


def example(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return found


def test_the_worked_example_is_taken_as_it_stands(tmp_path) -> None:
    given = json.loads(example("json"))
    assert {name: given[name] for name in CLASS} == CLASS
    file = tmp_path / "ucm.yaml"
    file.write_text(example("yaml"))

    settings = settings_of({**given, "UCM_CONFIG_FILE": str(file)})
    assert settings == load_settings_file(file)
    assert settings.store.storage_backends == ("/mnt/kv",)


def test_the_times_that_calls_wait_are_those_of_the_settings() -> None:
    by_name = dict(
        zip(
            Settings.__struct_fields__[-len(Settings.__struct_defaults__) :],
            Settings.__struct_defaults__,
            strict=True,
        )
    )
    said = dict(re.findall(r"`(\w+_timeout_ms)` \((\d+) s\)", TEXT))
    assert said == {
        name: str(by_name[name] // 1000) for name in ("lookup_timeout_ms", "dump_timeout_ms")
    }
    assert f"a call has returned after {MAX_CALL_S:g} s" in TEXT


def test_the_table_of_engines_has_the_layouts_that_are_taken_and_the_version_that_was_read() -> (
    None
):
    rows = table("platforms.md", "Other engines")
    assert {VERSION} == {name for row in rows for name in quoted(row[1])}
    assert VERSION in TEXT
    assert set(LAYOUTS) == {name for row in rows for name in quoted(row[2])}
    assert {row[3] for row in rows} == {"run", "read", "refused"}
