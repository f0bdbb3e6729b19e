"""docs/storage.md: its JSON is JSON, and says of rights what docs/configuration.md does."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from tests.source import ROOT
from ucm.config.settings import load_settings_file
from ucm.store.inspect.bucket_walk import Bounds

TEXT = (ROOT / "docs" / "storage.md").read_text()


def blocks() -> list[dict[str, Any]]:
    return [json.loads(each) for each in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)]


def test_the_settings_of_a_bucket_are_taken_as_they_stand(tmp_path: Path) -> None:
    """And rights and rules are those of that bucket, and of its prefix."""
    found = re.search(r"\n((?:    .*\n)*    ucm_connectors:\n(?:    .*\n)+)", TEXT)
    assert found is not None
    file = tmp_path / "ucm.yaml"
    file.write_text(textwrap.dedent(found[1]))

    store = load_settings_file(file).store

    assert (store.pipeline, bool(store.s3_endpoint)) == (("Cache", "S3"), True)
    assert f"arn:aws:s3:::{store.s3_bucket}/{store.s3_prefix}/*" in TEXT
    assert {store.s3_bucket} == set(re.findall(r"--bucket (\S+)", TEXT))
    assert f'"Prefix": "{store.s3_prefix}/"' in TEXT


def test_rights_are_those_of_the_settings_page() -> None:
    policy, _ = blocks()
    allowed: set[str] = set()
    for statement in policy["Statement"]:
        action = statement["Action"]
        allowed |= {action} if isinstance(action, str) else set(action)
    settings = (ROOT / "docs" / "configuration.md").read_text()
    assert allowed == set(re.findall(r"`(s3:\w+)`", settings))


def test_the_lifecycle_rule_expires_by_age_and_leaves_manifests() -> None:
    _, lifecycle = blocks()
    (rule,) = lifecycle["Rules"]
    assert rule["Status"] == "Enabled" and rule["Expiration"] == {"Days": 7}
    assert rule["Filter"]["And"]["ObjectSizeGreaterThan"] == 1 << 16


def test_options_and_bounds_of_tools_are_those_of_the_code() -> None:
    files = ("reclaim.py", "doctor.py", "verify.py")
    source = "".join((ROOT / "ucm" / "cli" / name).read_text() for name in files)
    for option in re.findall(r"`(--[a-z-]+)", TEXT.split("## S3")[1]):
        assert f'"{option}"' in source
    bounds = Bounds()
    assert f"`--max-requests` ({bounds.max_requests:,}:" in TEXT
    assert f"`--max-s` ({bounds.max_s:g})" in TEXT
