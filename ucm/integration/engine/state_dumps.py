"""Dumps of states: which blocks of a prompt get a page of them is for the engine to say, step by
step, for it keeps few and only for a while.

That of the last boundary can be foreseen, so that its slot is asked for in time; others are asked
for when they are offered. A state that is foreseen and not offered is a hole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from ucm.integration.copies.jobs import PagePart
from ucm.integration.engine.facts import EngineFacts, TargetFacts
from ucm.integration.engine.prompt import Prompt
from ucm.integration.engine.ranges import DumpCursor, SlotOfBlock
from ucm.store.node import protocol as p

# Of blocks of a prompt, the device block of each of the engine's groups with the state behind it.
StateBlocks = Mapping[int, Mapping[int, int]]

# vLLM's block that stands for those that a request has no more, or never had.
NULL_BLOCK = 0


class StateCursor(DumpCursor):
    """`todo` are the blocks whose states are expected, or offered and not copied yet."""

    def __init__(self, todo: Iterable[int], num_blocks: int) -> None:
        super().__init__(todo, num_blocks, goes_on_behind_holes=True)
        self._offered: set[int] = set()
        self._asked: set[int] = set()

    def offer(self, blocks: Collection[int]) -> None:
        """In this step, and no other, the engine has these."""
        self._offered = set(blocks)
        self.planned |= self._offered

    def ask(self, to_block: int) -> list[int]:
        wanted = self._offered.union(block for block in self.todo if block < to_block)
        blocks = sorted(wanted - self._asked)
        self._asked.update(blocks)
        return blocks

    def is_awaited(self, num_computed: int) -> bool:
        return not self._offered.issubset(self.slots) and self._offered.issubset(self._asked)

    def take(self, num_computed: int) -> list[SlotOfBlock]:
        """What is offered and has a slot; what is computed and not offered never will be."""
        taken = []
        for block in sorted(self._offered):
            offset = self.slots.pop(block, p.NO_ROOM)
            if offset == p.NO_ROOM:
                self.holes.add(block)
            else:
                self.holes.discard(block)
                if offset != p.HAVE:
                    taken.append(SlotOfBlock(block, offset))
        past = {block for block in self.todo if block < num_computed} - self._offered
        self.holes |= past
        self._drop(past | self._offered)
        self._offered = set()
        return taken

    def take_late(self, blocks: Iterable[int]) -> list[int]:
        """Those of them whose slots nothing will be copied into, which are forgotten."""
        late = [block for block in blocks if block not in self._offered and block not in self.todo]
        return [block for block in late if self.slots.pop(block, p.NO_ROOM) >= 0]

    def end_at(self, num_computed: int) -> None:
        self.holes.update(self.todo)
        super().end_at(num_computed)
        self.todo.clear()

    def node_lost(self) -> None:
        super().node_lost()
        self._asked = set()

    def _drop(self, blocks: Collection[int]) -> None:
        for block in blocks:
            if block in self.todo:
                self.todo.remove(block)


def offered_states(offers: Iterable[tuple[int, int, int]], prompt: Prompt) -> StateBlocks:
    """Of a prompt, as the engine offers them: group, device block, and after how many tokens."""
    found: dict[int, dict[int, int]] = {}
    for group, block_id, num_tokens in offers:
        number, rest = divmod(num_tokens, prompt.block_tokens)
        if not rest and 0 < number <= len(prompt.keys) and block_id != NULL_BLOCK:
            found.setdefault(number - 1, {})[group] = block_id
    return found


def states_at(
    num_tokens: int, device_blocks: Sequence[Sequence[int]], facts: EngineFacts
) -> StateBlocks:
    """Where the engine has the state that it goes on from at `num_tokens`, in the step that does:
    it has found it in its own cache, or loaded it. Nowhere else a state's block is known by its
    place."""
    found: dict[int, dict[int, int]] = {}
    for target in facts.targets:
        unit, blocks = target.block_tokens, device_blocks[target.group]
        number = num_tokens // unit - 1
        if target.field is None or num_tokens % unit or not 0 <= number < len(blocks):
            continue
        if blocks[number] != NULL_BLOCK:
            found.setdefault(number, {})[target.group] = blocks[number]
    return found


def parts_of_state(
    taken: SlotOfBlock, groups: Mapping[int, int], targets: Iterable[tuple[int, TargetFacts]]
) -> list[PagePart]:
    """The copies of one page, whose state lies in these blocks of groups; of NULL_BLOCK where one
    lacks."""
    return [
        PagePart(
            taken.offset + target.page_offset_bytes,
            first_token=0,
            block_ids=(groups.get(target.group, NULL_BLOCK),),
            target=number,
        )
        for number, target in targets
    ]
