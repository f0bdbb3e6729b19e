"""Where `ucm explain` says that a hit ends its engine would end it, whatever is lost."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection
from typing import cast

import pytest

from tests.cli.conftest import store as store
from tests.cli.parts import Store

pytest.importorskip("vllm")

from tests.cli.hybrids import (
    Hybrid,
    with_an_indexer,
    with_chunks_as_large,
    with_states,
    with_windows,
    with_windows_alone,
)
from tests.store.inspect.test_explain_strands import LONG, explained
from ucm.integration.engine.side_lookups import SideLookups, SideWaits
from ucm.outcome import Outcome
from ucm.store.blocks.hit_ends import likely_ends
from ucm.store.blocks.keys import Key
from ucm.store.client.session import NodeSession
from ucm.store.node import protocol as p

MAKERS = [with_windows, with_states, with_chunks_as_large, with_an_indexer, with_windows_alone]


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
