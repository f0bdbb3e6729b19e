"""What of a prompt is loaded, computed and dumped fits together, wherever its borders lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.integration.copies.jobs import PagePart
from ucm.integration.engine.prompt import Prompt
from ucm.integration.engine.ranges import (
    DumpCursor,
    missing_blocks,
    offered_tokens,
    part_of_block,
    parts_of_tokens,
)
from ucm.store.blocks.keys import Key, TailKey
from ucm.store.node import protocol as p

BLOCK = 128
# Of a slot; a multiple of the page's tokens, so that one says which block an offset is of.
SLOT = 4096


def prompt_of(num_tokens: int, *, with_tail: bool) -> Prompt:
    keys = [Key(bytes([i]) * 32) for i in range(num_tokens // BLOCK)]
    if with_tail and num_tokens % BLOCK:
        keys.append(Key(TailKey(b"t" * 32, num_tokens % BLOCK)))
    return Prompt("a", num_tokens, BLOCK, tuple(keys))


@dataclass(frozen=True)
class Drawn:
    """A prompt, what the engine has of it, and what the node cache answers to its lookup."""

    prompt: Prompt
    unit: int
    num_computed: int
    in_step: bool
    head_stored: int
    read_from: int
    num_stored: int

    @property
    def device_blocks(self) -> list[int]:
        return [1000 + i for i in range(-(-self.prompt.num_tokens // self.unit))]

    @property
    def offered(self) -> int:
        end_block = self.read_from + self.num_stored
        return offered_tokens(
            end_block * BLOCK,
            num_computed=self.num_computed,
            num_prompt=self.prompt.num_tokens,
            in_step=self.in_step,
        )

    @property
    def loaded(self) -> range:
        return range(self.num_computed, self.num_computed + self.offered)

    @property
    def missing(self) -> list[int]:
        return missing_blocks(
            len(self.prompt.keys),
            head_stored=self.head_stored,
            read_from=self.read_from,
            num_stored=self.num_stored,
        )

    def load_parts(self) -> tuple[PagePart, ...]:
        """From exactly the slots that were answered."""
        blocks = range(self.read_from, self.read_from + self.num_stored)
        slots = {block: block * SLOT for block in blocks}
        return parts_of_tokens(
            self.loaded.start,
            self.loaded.stop,
            slots,
            self.device_blocks,
            block_tokens=BLOCK,
            unit=self.unit,
        )

    def dump_part(self, block: int) -> PagePart:
        return part_of_block(
            block,
            block * SLOT,
            self.device_blocks,
            num_tokens=self.prompt.tokens_of(block),
            block_tokens=BLOCK,
            unit=self.unit,
        )

    def units_of(self, part: PagePart) -> Iterator[tuple[int, int]]:
        """The first token of each device block's content, and which device block has it."""
        first = part.slot_offset // SLOT * BLOCK + part.first_token
        for i, device_block in enumerate(part.block_ids):
            yield first + i * self.unit, device_block


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    prompt = prompt_of(draw(st.integers(1, 8 * BLOCK)), with_tail=draw(st.booleans()))
    unit = draw(st.sampled_from([16, 32, 64, 128]))
    num_computed = draw(st.integers(0, (prompt.num_tokens - 1) // unit)) * unit
    num_blocks = len(prompt.keys)
    read_from = min(num_computed // BLOCK, num_blocks)
    head_stored = draw(st.integers(0, read_from))
    # Nothing is had of what follows a head that is not all there.
    num_stored = draw(st.integers(0, num_blocks - read_from))
    in_step = draw(st.booleans())
    return Drawn(prompt, unit, num_computed, in_step, head_stored, read_from, num_stored)


@given(drawn())
def test_no_token_is_both_loaded_and_computed_and_one_is_left_to_compute(drawn: Drawn) -> None:
    loaded, num_prompt = drawn.loaded, drawn.prompt.num_tokens
    assert drawn.num_computed <= loaded.stop <= num_prompt
    assert loaded.stop <= (drawn.read_from + drawn.num_stored) * BLOCK or not loaded
    if drawn.in_step or num_prompt == 1:
        assert loaded.stop < num_prompt or not loaded
    elif loaded and drawn.read_from + drawn.num_stored == -(-num_prompt // BLOCK):
        assert loaded.stop == num_prompt, "all of it is there"


@given(drawn())
def test_the_parts_of_a_load_cover_what_is_offered_exactly_and_lie_in_their_pages(
    drawn: Drawn,
) -> None:
    parts = drawn.load_parts()

    units = [each for part in parts for each in drawn.units_of(part)]
    first, last = drawn.loaded.start // drawn.unit, -(-drawn.loaded.stop // drawn.unit)
    assert units == [(i * drawn.unit, 1000 + i) for i in range(first, last)]
    assert all(part.first_token + len(part.block_ids) * drawn.unit <= BLOCK for part in parts)
    slots = [part.slot_offset for part in parts]
    assert len(set(slots)) == len(slots), "a page is opened once"


@given(drawn())
def test_each_block_is_in_the_store_or_is_dumped_from_its_own_device_blocks(drawn: Drawn) -> None:
    missing = drawn.missing
    found = {
        *range(drawn.head_stored),
        *range(drawn.read_from, drawn.read_from + drawn.num_stored),
    }
    assert missing == sorted(set(missing))
    assert found.isdisjoint(missing)
    assert found | set(missing) == set(range(len(drawn.prompt.keys)))

    units = [each for block in missing for each in drawn.units_of(drawn.dump_part(block))]
    assert all(device_block == 1000 + token // drawn.unit for token, device_block in units)
    covered = Counter(token for token, _ in units)
    assert set(covered.values()) <= {1}, "a device block is read once"
    for block in missing:
        end = block * BLOCK + drawn.prompt.tokens_of(block)
        assert all(token in covered for token in range(block * BLOCK, end, drawn.unit))
        assert end <= drawn.prompt.num_tokens
        is_tail = block == drawn.prompt.num_tokens // BLOCK
        assert drawn.dump_part(block).tail_tokens == (end % BLOCK if is_tail else 0)


@given(drawn())
def test_no_block_is_both_loaded_and_dumped(drawn: Drawn) -> None:
    loaded = {part.slot_offset // SLOT for part in drawn.load_parts()}
    assert loaded.isdisjoint(drawn.missing)


@given(
    drawn(),
    st.lists(st.tuples(st.integers(1, 3 * BLOCK), st.booleans()), min_size=1, max_size=20),
    st.data(),
)
def test_however_late_slots_come_a_block_is_dumped_once_in_order_and_not_before_it_is_computed(
    drawn: Drawn, steps: list[tuple[int, bool]], data: st.DataObject
) -> None:
    prompt = drawn.prompt
    todo = drawn.missing
    cursor = DumpCursor(todo, len(prompt.keys))
    computed, asked, unanswered, taken, refused = drawn.loaded.stop, [], [], [], False
    for num_tokens, is_answered in steps:
        computed = min(computed + num_tokens, prompt.num_tokens)
        wanted = cursor.ask(prompt.blocks_in(computed + BLOCK))
        asked += wanted
        unanswered += wanted
        if is_answered:
            for block in unanswered:
                offset = data.draw(st.sampled_from([block * SLOT] * 6 + [p.HAVE, p.NO_ROOM]))
                cursor.slots[block] = offset
            unanswered = []
        num_blocks = prompt.blocks_in(computed)
        slots = dict(cursor.slots)
        new = cursor.take(num_blocks)
        assert not cursor.is_awaited(num_blocks) or cursor.todo[0] in unanswered
        assert all(each.block < num_blocks and slots[each.block] == each.offset for each in new)
        taken += [each.block for each in new]
        refused = refused or cursor.lost_from < len(prompt.keys)
        assert not refused or not cursor.todo, "nothing is dumped behind what is not"

    assert asked == sorted(set(asked)) and set(asked) <= set(todo)
    assert taken == sorted(set(taken)) and set(taken) <= set(asked)
    cursor.end_at(prompt.blocks_in(computed))
    assert cursor.lost_from <= prompt.blocks_in(computed)
    assert all(block < cursor.lost_from for block in taken)
    unused = set(cursor.take_unused())
    assert unused.isdisjoint(taken)


def test_slots_of_a_lost_node_cache_are_asked_for_again() -> None:
    cursor = DumpCursor(range(4), 4)
    assert cursor.ask(3) == [0, 1, 2]
    cursor.slots.update({0: 0, 1: SLOT, 2: 2 * SLOT})
    assert [each.block for each in cursor.take(1)] == [0]

    cursor.node_lost()

    assert cursor.lost_from == 0, "nobody knows what has reached storage"
    assert cursor.take(4) == []
    assert cursor.ask(4) == [1, 2, 3]


@pytest.mark.parametrize("offset", [p.HAVE, p.NO_ROOM])
def test_what_needs_no_copy_or_gets_none_is_not_copied(offset: int) -> None:
    cursor = DumpCursor(range(2), 2)
    cursor.ask(2)
    cursor.slots.update({0: offset, 1: SLOT})

    taken = [each.block for each in cursor.take(2)]

    assert (taken, cursor.lost_from) == (([1], 2) if offset == p.HAVE else ([], 0))
