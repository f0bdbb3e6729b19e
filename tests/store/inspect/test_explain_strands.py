"""What a model with several strands, or with windows, can load of a prompt, and what is in the way:
as its engine would find it."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from tests.cli.conftest import store as store
from tests.cli.parts import Store, flip_bit, manifest

pytest.importorskip("vllm")

from tests.cli.hybrids import (
    Hybrid,
    with_an_indexer,
    with_chunks_as_large,
    with_states,
    with_windows,
    with_windows_alone,
)
from ucm.cli.explain import _print as printed
from ucm.errors import ConfigError, UcmError
from ucm.integration.engine.side_lookups import SideLookups, SideWaits
from ucm.outcome import Outcome
from ucm.store.blocks.hit_ends import likely_ends
from ucm.store.blocks.keys import Key
from ucm.store.blocks.namespace import Manifest, fingerprint, without_strands
from ucm.store.client.session import NodeSession
from ucm.store.inspect.asked_prompt import AskedPrompt
from ucm.store.inspect.examine import examine_model
from ucm.store.inspect.explain import Explanation, explain
from ucm.store.inspect.strands_in_store import with_strands_of_store
from ucm.store.node import protocol as p

LONG = list(range(1000, 1330))  # 20 blocks of 16 tokens, and a tail of 10
MAKERS = [with_windows, with_states, with_chunks_as_large, with_an_indexer, with_windows_alone]


def explained(store: Store, made: Manifest, **asked: Any) -> Explanation:
    in_memory = asked.pop("in_memory", ())
    return explain(
        [str(store.path)],
        AskedPrompt(manifest=made, tokens=LONG, **asked),
        None,
        in_memory=in_memory,
        on_progress=lambda done, total: None,
    )


class FakeSession:
    """A node cache that has these pages."""

    def __init__(self, keys: Collection[bytes], num_strands: int) -> None:
        self.namespaces = tuple(range(num_strands))
        self._keys = keys
        self._asked: list[tuple[p.Lookup, Callable[[p.LookupReply], None]]] = []
        self._ids = iter(range(1_000_000))

    def next_id(self) -> int:
        return next(self._ids)

    def release(self, lookup_id: int) -> None:
        pass

    def ask(self, question: p.Lookup, on_answer: Callable[[p.LookupReply], None]) -> None:
        self._asked.append((question, on_answer))

    def answer(self) -> None:
        while self._asked:
            question, on_answer = self._asked.pop(0)
            found = 0
            while found < len(question.keys) and question.keys[found] in self._keys:
                found += 1
            is_all = found == len(question.keys)
            on_answer(
                p.LookupReply(
                    id=question.id,
                    offsets=[0] * found,
                    num_stored=found,
                    from_files=0,
                    head_stored=found,
                    reason=Outcome.FINE if is_all else Outcome.NEVER_STORED,
                )
            )


def end_of_engine(made: Hybrid, keys: Collection[bytes], interval_tokens: int | None) -> int:
    """How far the connector tells vLLM to go, if the store has these pages."""
    prompt, facts = made.prompt(LONG), made.facts
    interval = facts.interval_tokens(interval_tokens)
    there = [key in keys for key in prompt.keys]
    num_there = there.index(False) if False in there else len(there)
    if facts.has_base and not num_there:
        return 0
    ends = (
        prompt.ends_in_base(num_there, interval, with_states=facts.has_states)
        if facts.has_base
        else likely_ends(
            facts.strands[0].reach,
            prompt.boundaries(interval),
            found={block for block, is_there in enumerate(there) if is_there},
            absent={block for block, is_there in enumerate(there) if not is_there},
            block_tokens=prompt.block_tokens,
        )
    )
    session = FakeSession(keys, len(facts.strands))
    lookups = SideLookups(
        cast(NodeSession, session),
        facts,
        prompt,
        read_from=0,
        ends=ends,
        waits=SideWaits(until_s=time.monotonic() + 600, promised_blocks=0),
        on_shorter=lambda num_blocks, reason: None,
    )
    session.answer()
    assert lookups.is_settled
    return lookups.end_tokens


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("interval_tokens", [None, 64])
def test_a_hit_ends_where_the_engine_would_end_it(
    store: Store, make: Callable[[], Hybrid], interval_tokens: int | None
) -> None:
    made, ends = make(), set()
    prompt = made.prompt(LONG)
    store.put(made.manifest, [])
    kept = [
        prompt.key_of(block, number)
        for number, blocks in enumerate(made.kept(prompt, interval_tokens))
        for block in blocks
    ]
    rng = random.Random(7)
    for number in range(40):
        lost = rng.sample(kept, min(number % 4, len(kept)))
        keys = {bytes(key) for key in kept if key not in lost}
        found = explained(
            store,
            made.manifest,
            in_memory={Key(key) for key in keys},
            window_interval=interval_tokens,
            state_interval_tokens=made.facts.state_interval_tokens,
        )
        expected = end_of_engine(made, keys, interval_tokens)
        assert found.num_loadable_tokens == expected, [key.hex() for key in lost]
        assert found.num_loadable == -(-expected // prompt.block_tokens)
        ends.add(expected)
    assert len(ends) > 1


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
