"""What `ucm warm` says where there is nothing to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.parts import BLOCK_TOKENS, Store, keys_of, manifest
from ucm.cli import warm
from ucm.errors import ConfigError
from ucm.store.blocks.namespace import to_json
from ucm.store.inspect.engine_identity import EngineIdentity
from ucm.store.inspect.given_prompts import GivenPrompt
from ucm.store.inspect.warm import Warmed

MADE = manifest("a")
LONG = list(range(BLOCK_TOKENS))


def ask(backend: Path, *prompts: list[int]) -> int:
    identity = EngineIdentity(manifest_json=to_json(MADE).decode(), tokens=[*prompts])
    given = [GivenPrompt(tokens) for tokens in prompts]
    return len(warm._asked(identity, given, (str(backend),), None, ""))


def test_a_store_that_is_not_mounted_is_told_and_none_is_made_in_its_place(tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    for backend in (missing, empty):
        with pytest.raises(ConfigError, match=f"^{backend}: no storage backend: .*: mount it"):
            ask(backend, LONG)
    assert not missing.exists() and list(empty.iterdir()) == []


def test_prompts_that_are_all_shorter_than_a_block_are_told(tmp_path: Path) -> None:
    Store(tmp_path).put(MADE, keys_of(MADE, LONG))
    assert ask(tmp_path, LONG[1:], LONG) == 2
    with pytest.raises(ConfigError, match=f"a block, which has {BLOCK_TOKENS} tokens"):
        ask(tmp_path, LONG[1:], LONG[2:])


@pytest.mark.parametrize("as_json", [False, True])
def test_where_nothing_was_found_the_tool_that_knows_why_is_named(
    as_json: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    warm._print(Warmed(num_prompts=1, missing=2), as_json=as_json)
    printed = capsys.readouterr()
    assert "ucm explain" in printed.err and printed.err.count("\n") == 1
    assert printed.out.startswith("{" if as_json else "1 prompt: 0 pages read")
    for found in (Warmed(missing=2, read=1), Warmed(missing=2, in_memory=1)):
        warm._print(found, as_json=as_json)
        assert capsys.readouterr().err == ""
