"""Files of settings with any damage: one line of ours that says what is wrong, or settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.config.bad_settings import LAUGHS, SEED
from tests.fuzz.inputs import bad_inputs, bounded, bounds, few_and_many
from ucm.config.settings import Settings, load_settings_file
from ucm.errors import ConfigError
from ucm.pd.fleet.file import read_instances

INSTANCES = "prefill:\n  - http://10.0.0.1:7800\ndecode:\n  - http://10.0.0.2:7801\nworker: []\n"
SEEDS = [
    SEED,
    SEED + "model_id: &a x\nepoch: 3\nreset_epoch: keep\n",
    "base: &base {use_layerwise: true}\n<<: *base\n" + SEED,
    "a0: &a0 [x]\n" + LAUGHS,
    "&a {ucm_connectors: *a}\n",
    INSTANCES,
]
WORDS = [
    text.encode()
    for text in (
        *(
            "&a ",
            "*a",
            "<<: *a\n",
            "<<: ",
            "? ",
            "- ",
            ": ",
            "[",
            "]",
            "{",
            "}",
            "|",
            ">",
            "'",
            '"',
        ),
        *("!!int ", "!!int ''", "!!float ", "!!bool ", "!!bool x", "!!null ", "!!timestamp x"),
        *("!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!binary x", "!!python/name:os"),
        *("!!str {", "!!seq {}", "!!map []", "!<tag:yaml.org,2002:int> -", "!!int '-'"),
        *(
            "0x",
            "0b",
            "0o",
            "0x" + "f" * 5000,
            "9" * 5000,
            "1" + ":59" * 400,
            "1" + ":59" * 400 + ".5",
        ),
        *(".inf", ".nan", "2024-13-45", "2024-01-01", "1e999", "---\n", "...\n", "%YAML 9.9\n"),
        *("%TAG ! x\n", "\t", "\n", "  ", "#", "\\", "\0", "\x85", "\u2028", "\ufeff", "\ud7ff"),
        *("[" * 100, "[" * 5000, "{a: " * 300, "- " * 2000, '"\\ud800"', '"\\U00110000"'),
    )
]


@few_and_many
@pytest.mark.parametrize(
    "read", [load_settings_file, read_instances], ids=["settings", "instances"]
)
def test_any_file_of_settings_is_one_line_that_says_what_is_wrong_or_loads(
    tmp_path: Path, num_inputs: int, read: Callable[[str], object]
) -> None:
    file = tmp_path / "ucm.yaml"
    seeds = [seed.encode() for seed in SEEDS]
    with bounds():
        for data in bad_inputs(seeds, num_inputs // 2, words=WORDS, salt=len(read.__name__)):
            file.write_bytes(data)
            with bounded(data):
                try:
                    loaded = read(str(file))
                except ConfigError as error:
                    message = str(error)
                    assert message.startswith(f"{file}: ") and "\n" not in message
                    message.encode()
                    raise
                assert isinstance(loaded, (Settings, dict))
