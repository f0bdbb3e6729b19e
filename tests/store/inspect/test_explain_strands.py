"""What a model with several strands, or with windows, can load of a prompt, and what is in the way:
as its engine would find it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.cli.conftest import store as store
from tests.cli.parts import Store, flip_bit, manifest, settings_file

pytest.importorskip("vllm")

from tests.cli.hybrids import (
    Hybrid,
    with_states,
    with_windows,
    with_windows_alone,
)
from ucm.cli.explain import _in_memory as in_memory
from ucm.cli.explain import _print as printed
from ucm.errors import ConfigError, UcmError
from ucm.store.blocks.keys import Key
from ucm.store.blocks.namespace import Manifest, fingerprint, without_strands
from ucm.store.inspect import node_memory
from ucm.store.inspect.asked_prompt import AskedPrompt
from ucm.store.inspect.engine_identity import EngineIdentity
from ucm.store.inspect.examine import examine_model
from ucm.store.inspect.explain import Explanation, explain
from ucm.store.inspect.given import given_store
from ucm.store.inspect.strands_in_store import with_strands_of_store

LONG = list(range(1000, 1330))  # 20 blocks of 16 tokens, and a tail of 10


def explained(store: Store, made: Manifest, **asked: Any) -> Explanation:
    there = asked.pop("in_memory", ())
    return explain(
        [str(store.path)],
        AskedPrompt(manifest=made, tokens=LONG, **asked),
        None,
        in_memory=there,
        on_progress=lambda done, total: None,
    )


def test_what_prefill_keeps_is_there_and_the_hit_ends_behind_it(store: Store) -> None:
    made = with_windows()
    made.fill(store, LONG)
    found = explained(store, made.manifest)

    assert (found.is_known, found.namespace) == (True, fingerprint(made.manifest).hex())
    assert (found.num_loadable, found.num_loadable_tokens, found.num_tokens) == (20, 320, 330)
    assert {block.strand for block in found.blocks} == {"all"}
    prompt = made.prompt(LONG)
    assert [(each.strand, each.block, each.key, each.state) for each in found.sides] == [
        ("window 256", block, prompt.key_of(block, 1).hex(), "stored") for block in range(4, 20)
    ]
    (end,) = found.ends
    assert (end.end_tokens, end.strand, end.block) == (320, "", -1)


def test_the_strand_that_is_in_the_way_is_named_with_its_block(store: Store) -> None:
    made = with_windows()
    made.fill(store, LONG, interval_tokens=64)
    prompt = made.prompt(LONG)
    page = store.file(made.manifest, prompt.key_of(17, 1))
    flip_bit(page)

    found = explained(store, made.manifest, window_interval=64)
    assert [(end.end_tokens, end.strand, end.block) for end in found.ends] == [
        (320, "window 256", 17),
        (256, "", -1),
    ]
    (bad,) = [block for block in found.sides if block.state != "stored"]
    assert (bad.block, bad.state, bad.where) == (17, "corrupt", str(page))
    assert (found.num_loadable, len(found.blocks)) == (16, 20)


def test_what_is_printed_names_strands_and_ends_with_what_is_in_the_way(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    made = with_windows()
    made.fill(store, LONG, interval_tokens=64)
    store.file(made.manifest, made.prompt(LONG).key_of(17, 1)).unlink()
    printed(explained(store, made.manifest, window_interval=64))

    first, *_, last = lines = capsys.readouterr().out.splitlines()
    name = fingerprint(made.manifest).hex()[:12]
    assert first == f"gemma (all, window 256), namespace {name} of the store:"
    cells = [re.split(r"  +", line)[:4] for line in lines[3:-1]]
    assert cells == [
        ["all", "0-19", "0-319", "stored"],
        ["all", "tail", "320-329", "not stored"],
        ["window 256", "0-16", "0-271", "stored"],
        ["window 256", "17", "272-287", "not stored"],
        ["window 256", "18-19", "288-319", "stored"],
    ]
    assert last == (
        "16 of 20 blocks can be loaded, 256 of 330 tokens; at 320 window 256 lacks block 17."
    )

    printed(explained(store, without_strands(with_states().manifest)))
    assert capsys.readouterr().out.startswith(
        "The store has nothing of this engine.\n  the nearest"
    )


def test_a_damaged_block_of_the_first_strand_is_what_is_in_the_way(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no other strand, of which nobody keeps what is needed there."""
    made = with_windows()
    made.fill(store, LONG)
    flip_bit(store.file(made.manifest, made.prompt(LONG).key_of(3)))
    found = explained(store, made.manifest)
    printed(found)

    assert found.ends[0].strand == "window 256"
    assert capsys.readouterr().out.splitlines()[-1].endswith("; block 3 of all is corrupt.")


def test_where_there_are_states_no_tail_is_told_of(store: Store) -> None:
    """Nobody keeps a state inside of a block."""
    made = with_states()
    made.fill(store, LONG)
    found = explained(store, made.manifest)

    assert (len(found.blocks), found.tail, found.num_handed_over) == (20, None, 0)


def test_blocks_that_no_boundary_needs_are_not_told_of(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a window most blocks of a long prompt are kept by nobody."""
    made = with_windows()
    made.fill(store, LONG)
    printed(explained(store, made.manifest))
    shown = capsys.readouterr().out
    assert re.search(r"\nwindow 256 +4-19 +64-319 +stored\n", shown)
    assert shown.endswith("\n20 of 20 blocks can be loaded, 320 of 330 tokens.\n")


def test_a_hand_off_loads_the_tail_of_every_strand(store: Store) -> None:
    made = with_windows()
    made.fill(store, LONG, with_tail=True)
    found = explained(store, made.manifest)
    assert (found.num_loadable_tokens, found.num_handed_over) == (320, 329)
    assert found.tail is not None and found.tail.state == "stored"

    store.file(made.manifest, made.prompt(LONG, with_tail=True).key_of(20, 1)).unlink()
    assert explained(store, made.manifest).num_handed_over == 320


def test_why_a_side_page_is_missing_is_told_as_of_any(store: Store) -> None:
    made = with_windows()
    made.fill(store, LONG)
    (state,) = {block.state for block in explained(store, made.manifest, salt="tenant").sides}
    why = "stored with no salt, asked for with the salt 'tenant'"
    assert state == "other_salt"
    assert {block.why for block in explained(store, made.manifest, salt="tenant").sides} == {why}


def test_an_engine_of_another_dtype_is_named_so_though_its_strands_have_other_names(
    store: Store,
) -> None:
    made = with_windows()
    first, window = made.manifest.strands or []
    other = msgspec.structs.replace(
        made.manifest,
        kv_dtype="fp8",
        strands=[
            {**first, "item_bytes": 1},
            {**window, "item_bytes": 1, "name": "window-256/4x64+64/1"},
        ],
    )
    store.put(made.manifest, [])
    Hybrid(made.facts, other).fill(store, LONG)
    assert {block.state for block in explained(store, made.manifest).blocks} == {"other_dtype"}

    wider = msgspec.structs.replace(other, strands=[{**first, "reach": "window 512"}, window])
    shutil.rmtree(store.path / fingerprint(other).hex())
    Hybrid(made.facts, wider).fill(store, LONG)
    assert {block.state for block in explained(store, made.manifest).blocks} == {"other_namespace"}


def test_a_node_cache_is_asked_for_each_strands_pages_by_their_size(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a key of a page of another size for a mistake."""
    made, asked = with_windows(), []

    def keys_in_memory(
        settings: object, manifest: Manifest, keys: list[Key], *, page_bytes: int
    ) -> frozenset[Key]:
        asked.append((page_bytes, len(keys)))
        return frozenset(keys[:1])

    monkeypatch.setattr(node_memory, "keys_in_memory", keys_in_memory)
    store.put(made.manifest, [])
    given = given_store(str(settings_file(tmp_path, store.path)))
    prompt = AskedPrompt(manifest=made.manifest, tokens=LONG)
    found = in_memory(given, EngineIdentity(), prompt)
    assert asked == [(strand.geometry.page_bytes, 21) for strand in made.facts.strands]
    named = made.prompt(LONG)
    assert found == {named.key_of(0), named.key_of(0, 1)}


def test_an_engine_that_does_not_run_has_the_strands_that_the_store_tells(store: Store) -> None:
    made, plain = with_windows(), manifest("gemma")
    unknown = without_strands(made.manifest)
    backends = [str(store.path)]
    store.put(plain, [])
    nothing = explained(store, with_strands_of_store(unknown, backends))
    assert (nothing.is_known, nothing.namespace, nothing.ends) == (False, "", [])
    assert "format_version: 1 (the store) / 2 (this engine)" in nothing.differences
    assert not any("num_layers" in line for line in nothing.differences)

    made.fill(store, LONG)
    assert with_strands_of_store(unknown, backends) == made.manifest
    assert with_strands_of_store(plain, backends, "abc") == plain
    assert with_strands_of_store(unknown, backends, fingerprint(made.manifest).hex()[:6])
    other = msgspec.structs.replace(unknown, kv_dtype="fp8")
    assert with_strands_of_store(other, backends) == other
    assert explained(store, other).differences == [
        "kv_dtype: bfloat16 (the store) / fp8 (this engine)"
    ]


def test_where_several_may_be_the_engines_own_people_say_which(store: Store) -> None:
    windows, alone = with_windows().manifest, with_windows_alone().manifest
    alone = msgspec.structs.replace(alone, weights=windows.weights)
    for each in (windows, alone):
        store.put(each, [])
    with pytest.raises(ConfigError) as refused:
        with_strands_of_store(without_strands(windows), [str(store.path)])
    for each, strands in ((windows, "(all, window 256)"), (alone, "(window 256)")):
        name = fingerprint(each).hex()
        assert f"{name[:12]} gemma {strands}" in str(refused.value)
        assert with_strands_of_store(without_strands(alone), [str(store.path)], name[:8]) == each
    with pytest.raises(ConfigError, match="0 namespaces"):
        with_strands_of_store(without_strands(windows), [str(store.path)], "xyz")


def test_strands_of_a_kind_that_is_unknown_are_said_to_be(store: Store) -> None:
    odd = manifest("a", format_version=2, strands=[{"reach": "spiral 7"}])
    store.put(odd, [])
    with pytest.raises(UcmError, match="has strands that this version doesn't know: 'spiral'"):
        explained(store, odd)


def test_doctor_knows_a_model_by_all_but_its_strands(store: Store, tmp_path: Path) -> None:
    made = with_windows()
    unknown = without_strands(made.manifest)
    store.put(manifest("gemma"), [])
    (finding,) = examine_model(str(store.path), "gemma", unknown)
    assert "has nothing of it" in finding.found and "format_version: 1" in finding.fix

    store.put(made.manifest, [])
    (finding,) = examine_model(str(store.path), "gemma", unknown)
    assert finding.found == "gemma: the store has its pages"
