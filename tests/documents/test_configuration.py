"""docs/configuration.md is checked against the code, both ways."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from ucm.config.settings import VOCABULARY, Settings, StoreSettings
from ucm.config.vocabulary import UNUSED_KEYS

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def documented(heading: str) -> set[str]:
    """The names in the first column of the tables below `heading`."""
    text = DOCUMENT.read_text()
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, f"no section {heading}"
    rows = re.findall(r"^\| (`.*?) \|", section[1], re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_documentation_has_every_setting_and_no_other() -> None:
    """docs/configuration.md is checked against the code, both ways."""
    assert set(VOCABULARY.used["top"]) - {"ucm_connectors"} == documented("Engine")
    assert set(VOCABULARY.used["store"]) == documented("Store")


def test_the_documentation_gives_the_defaults_of_the_code() -> None:
    """One place per fact; the second one is compared with it."""
    text = DOCUMENT.read_text()
    fields = [
        *msgspec.structs.fields(Settings),
        *(f for f in msgspec.structs.fields(StoreSettings) if f.name != "cache_capacity_bytes"),
    ]
    for field in fields:
        if field.name in ("store", "warnings", "pipeline", "storage_backends", "socket_path"):
            continue
        is_number = isinstance(field.default, (int, float)) and not isinstance(field.default, bool)
        shown = f"{field.default:.12g}" if is_number else str(field.default).lower()
        assert f"| `{field.encode_name}` | {shown} |" in text


def test_the_documentation_lists_what_is_accepted_without_effect() -> None:
    """With the reason, both ways."""
    text = DOCUMENT.read_text()

    assert {key for group in UNUSED_KEYS for key in group.keys} == documented(
        "Accepted without effect"
    )
    for group in UNUSED_KEYS:
        row = ", ".join(f"`{key}`" for key in group.keys)
        assert f"| {row} | {group.why} |" in text
