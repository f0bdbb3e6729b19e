"""docs/models.md says of models what the code says."""

from __future__ import annotations

import json
import re
import shlex

import yaml

from benchmarks.model_bytes import PROMPTS, bytes_table, shapes_table
from examples.cluster.processes import ucm_connector
from tests.documents.document_tables import ROOT, quoted, table
from tests.documents.messages import messages
from tests.e2e.hybrid_models import MODELS
from ucm.config.settings import load_settings
from ucm.integration.vllm import kv_specs
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
    rows = re.findall(r"^\| `(all|window|chunk|state)[^`]*` \|", TEXT, re.MULTILINE)
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


def test_what_is_written_is_what_the_program_prints() -> None:
    section = TEXT.partition("\n## What is written\n")[2]
    assert "`.venv/bin/python benchmarks/model_bytes.py`" in section
    for printed in (shapes_table(1), bytes_table(PROMPTS, 1)):
        assert "\n".join(("", *printed, "")) in section


def test_the_default_distance_of_boundaries_is_that_of_the_code() -> None:
    assert default_interval_tokens([Reach(ReachKind.WINDOW, 1024)]) == 2048
    assert default_interval_tokens([Reach(ReachKind.WINDOW, 4096)]) == 2 * 4096
    assert "by default 2048, or twice the longest window or chunk where that is more" in TEXT


def test_the_engines_of_an_example_have_its_settings_and_their_blocks_fit_them() -> None:
    section = TEXT.partition("\n## Two to begin with\n")[2].partition("\n## ")[0]
    examples = re.findall(
        r"`(/etc/[^`]*)`[^`]*```yaml\n(.*?)```\n(.*?)(?=\n\*\*|\Z)", section, re.DOTALL
    )
    assert len(examples) == 2
    for file, text, servers in examples:
        settings = load_settings(yaml.safe_load(text))
        commands = re.findall("```bash\n(.*?)```", servers, re.DOTALL)
        lines = [shlex.split(command.replace("\\\n", " ")) for command in commands]
        flags = [dict(zip(line, [*line[1:], ""], strict=True)) for line in lines]
        assert [each["--port"] for each in flags] == ["7800", "7801"]
        for each in flags:
            assert json.loads(each["--kv-transfer-config"]) == ucm_connector(file)
            assert int(each["--block-size"]) == settings.block_tokens
            has_states = settings.block_tokens != 128
            assert ("--enable-prefix-caching" in each) == has_states
    assert f"| {settings.block_tokens} | {settings.block_tokens} |" in "\n".join(shapes_table(2))
