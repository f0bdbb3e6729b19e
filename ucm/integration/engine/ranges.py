"""Which parts of a prompt are loaded, computed and dumped. Pure; all ranges are half-open.

A prompt of five blocks and a tail. vLLM has its first `num_computed` tokens itself; the lookup
asked for the block that they end in and all behind it:

                     head_stored  read_from         read_from + num_stored
                        │           │                       │
    blocks  ├──── 0 ────┼──── 1 ────┼──── 2 ────┼──── 3 ────┼──── 4 ────┼ tail ─┤
    tokens  ├──────── vLLM's own ────────┼───── loaded ─────┼──── computed ─────┤
            0                       num_computed    + offered_tokens      num_prompt
    dumped              ├───────────┤                       ├───────────────────┤

What vLLM has itself and the store lacks is dumped as what is computed is. vLLM takes all that it is
offered, or the next lookup starts elsewhere. The blocks of a dump:

    todo ──ask──► asked ──answered──► has a slot ──computed──► taken

    in the store, or on its way ─┬─ has a slot or is asked for ─┬─ to be asked for ─┐
                              todo[0]                       asked_to           todo[-1]

From `lost_from` on the store will lack something: what it has behind that is of no use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ucm.integration.copies.jobs import PagePart
from ucm.store.node import protocol as p


def offered_tokens(end: int, *, num_computed: int, num_prompt: int, in_step: bool) -> int:
    """How many tokens vLLM can have beside the `num_computed` that it has, when those before `end`
    are pinned; 0 if there are none. `in_step`: the step that loads them computes as well."""
    # That step must have a token left to compute. An asynchronous load may cover the whole prompt:
    # vLLM then computes the last token again. With nothing in front of that token it would find
    # nothing computed, and ask again, for ever.
    limit = num_prompt - 1 if in_step or num_prompt == 1 else num_prompt
    return max(0, min(end, limit) - num_computed)


def missing_blocks(
    num_blocks: int, *, head_stored: int, read_from: int, num_stored: int
) -> list[int]:
    """What a lookup did not find in the store, of a prompt of `num_blocks`."""
    return [*range(head_stored, read_from), *range(read_from + num_stored, num_blocks)]


@dataclass(frozen=True)
class SlotOfBlock:
    """What of a dump is copied next."""

    block: int
    offset: int


class DumpCursor:
    """How far the dump of a prompt of `num_blocks` has come. `todo` are the blocks that the store
    lacks, in the prompt's order: one leaves it when its copy is on its way, when somebody else has
    it, or when it is given up. Each is asked for once, until the node cache is lost."""

    def __init__(
        self, todo: Iterable[int], num_blocks: int, *, goes_on_behind_holes: bool = False
    ) -> None:
        self.todo = deque(todo)
        self.holes: set[int] = set()
        self._goes_on = goes_on_behind_holes
        self.planned = frozenset(self.todo)
        self.num_blocks = self.lost_from = num_blocks
        self.asked_to = 0
        # What the node cache has answered: offsets, HAVE or NO_ROOM.
        self.slots: dict[int, int] = {}

    def grow(self, num_blocks: int) -> None:
        """There are more blocks, none of which the store is known to have. Behind what it lacks
        they are of no use."""
        more = range(self.num_blocks, num_blocks)
        if self.lost_from == self.num_blocks:
            self.lost_from = num_blocks
        elif not self._goes_on:
            return
        self.num_blocks = num_blocks
        self.todo.extend(more)
        self.planned |= frozenset(more)

    def ask(self, to_block: int) -> list[int]:
        """The blocks before `to_block` that need a slot and have not been asked for."""
        blocks = [block for block in self.todo if self.asked_to <= block < to_block]
        if blocks:
            self.asked_to = blocks[-1] + 1
        return blocks

    def is_awaited(self, num_computed: int) -> bool:
        """Whether the next block is among the first `num_computed`, and only its slot is missing,
        which has been asked for."""
        return (
            bool(self.todo)
            and self.todo[0] < min(num_computed, self.asked_to)
            and self.todo[0] not in self.slots
        )

    def take(self, num_computed: int) -> list[SlotOfBlock]:
        """What can be copied when the first `num_computed` blocks are computed. Where there is no
        room, all that follows is given up, unless it can be used without."""
        taken = []
        while self.todo and self.todo[0] < num_computed and self.todo[0] in self.slots:
            block = self.todo[0]
            offset = self.slots.pop(block)
            if offset == p.NO_ROOM and not self._goes_on:
                self.give_up()
                break
            self.todo.popleft()
            if offset == p.NO_ROOM:
                self.holes.add(block)
                continue
            if offset != p.HAVE:
                taken.append(SlotOfBlock(block, offset))
        return taken

    def take_unused(self) -> list[int]:
        """The blocks whose slots nothing will be copied into, once nothing is to do."""
        unused = [block for block, offset in self.slots.items() if offset >= 0]
        self.slots.clear()
        return unused

    def lose(self, block: int) -> None:
        """The store will lack it."""
        self.lost_from = min(self.lost_from, block)

    def fail(self, blocks: Sequence[int]) -> None:
        """These could not be copied."""
        if self._goes_on:
            self.holes.update(blocks)
        else:
            self.lose(blocks[0])

    def is_kept(self, block: int) -> bool:
        """Of a dump that goes on behind holes: whether the store will have it."""
        return block in self.planned and block not in self.holes and block < self.lost_from

    @property
    def first_lost(self) -> int:
        """The first block that the store will lack; the number of blocks if it is none."""
        return min((self.lost_from, *self.holes))

    def end_at(self, num_computed: int) -> None:
        """Nothing more is computed."""
        self.lose(num_computed)
        self.todo = deque(block for block in self.todo if block < num_computed)

    def give_up(self) -> None:
        if self.todo:
            self.lose(self.todo[0])
        self.todo.clear()

    def node_lost(self) -> None:
        """Of what the node cache had, nobody knows what has reached storage."""
        self.lost_from = 0
        self.slots.clear()
        self.asked_to = self.todo[0] if self.todo else 0


def part_of_block(
    block: int,
    slot_offset: int,
    device_blocks: Sequence[int],
    *,
    num_tokens: int,
    block_tokens: int,
    unit: int,
    target: int = 0,
) -> PagePart:
    """The first `num_tokens` of a block of `block_tokens`, kept in device blocks of `unit` tokens
    each. The last of these may reach further: fewer than a block's are a tail's."""
    first = block * block_tokens // unit
    return PagePart(
        slot_offset=slot_offset,
        first_token=0,
        block_ids=tuple(device_blocks[first : first - (-num_tokens // unit)]),
        tail_tokens=num_tokens if num_tokens < block_tokens else 0,
        target=target,
    )


def parts_of_tokens(
    start: int,
    end: int,
    slot_offsets: Mapping[int, int],
    device_blocks: Sequence[int],
    *,
    block_tokens: int,
    unit: int,
    target: int = 0,
) -> tuple[PagePart, ...]:
    """The device blocks that hold tokens [start, end), block by block of the store.

    `start` is at the border of a device block; the last device block may reach past `end`, where
    the page has the tokens that follow.
    """
    assert start % unit == 0, "vLLM hands out whole device blocks"
    parts = []
    at = start
    while at < end:
        block = at // block_tokens
        stop = min((block + 1) * block_tokens, -(-end // unit) * unit)
        parts.append(
            PagePart(
                slot_offset=slot_offsets[block],
                first_token=at - block * block_tokens,
                block_ids=tuple(device_blocks[at // unit : stop // unit]),
                target=target,
            )
        )
        at = stop
    return tuple(parts)
