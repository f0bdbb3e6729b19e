"""docs/peers.md is checked against the contenders and how they are set up."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from benchmarks import contenders, lmcache_peer
from benchmarks.lmcache_peer import LmcacheNode
from tests.documents.document_tables import ROOT, quoted, table


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if LMCache were, in a folder of its own."""
    monkeypatch.setattr(lmcache_peer, "ENVIRONMENT", tmp_path)
    (tmp_path / ".ready").touch()
    return tmp_path


def test_it_lists_every_contender_and_no_other(installed: Path) -> None:
    rows = table("peers.md", "Who they are")
    listed = [name for names, *_ in rows for name in quoted(names)]
    assert sorted(listed) == sorted(each.name for each in contenders.contenders(installed, None))


def test_lmcache_is_set_up_as_it_says(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(lmcache_peer, "HttpServer", lambda command, **_: commands.append(command))
    node = LmcacheNode.new("left", files=installed)
    node.start(installed / "log")
    told = dict(itertools.pairwise(commands[0]))
    told["--l2-adapter"] = json.loads(told["--l2-adapter"])["type"]
    told.update(node.kv_transfer()["kv_connector_extra_config"])
    told["--l1-size-gb"] = f"{node.dram_gb:g}"

    rows = [
        (name, value) for names, value, _ in table("peers.md", "LMCache") for name in quoted(names)
    ]
    assert len(rows) > 5
    for name, value in rows:
        assert str(told[name]).lower() == value.strip("`"), name


def test_its_version_is_the_one_that_is_pinned() -> None:
    pinned = re.search(
        r"^lmcache==(\S+)$", (ROOT / "requirements/peers.txt").read_text(), re.MULTILINE
    )
    assert pinned is not None
    assert f"Version {pinned[1]} runs" in (ROOT / "docs/peers.md").read_text()
