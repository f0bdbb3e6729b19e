"""What of one request's prompt goes into the store, strand by strand (ucm/store/blocks/strands.py).

Each strand has pages, slots and a cursor of its own. The blocks of the base are dumped as the
prompt grows. Of a strand with a smaller reach only some blocks are kept, and vLLM takes its device
blocks back while the request runs: one whose slot comes too late is a hole, and the rest goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from ucm.integration.copies.jobs import PagePart
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.prompt import Prompt
from ucm.integration.engine.ranges import DumpCursor, SlotOfBlock, part_of_block
from ucm.integration.engine.state_dumps import (
    NULL_BLOCK,
    StateBlocks,
    StateCursor,
    parts_of_state,
)
from ucm.store.blocks.keys import Key
from ucm.store.blocks.strands import ALL, STATE, Reach, boundaries, needed_blocks

# Of each of the engine's groups, the device blocks of a request.
DeviceBlocks = Sequence[Sequence[int]]


@dataclass(frozen=True)
class DumpEnd:
    """Of a request that has ended: `kept_blocks` leading blocks of its prompt are in the store, or
    on their way there, `kept_with_answer` of what was answered as well. While it `is_copying` its
    device blocks are still being copied from."""

    is_copying: bool = False
    kept_blocks: int = 0
    kept_with_answer: int = 0


@dataclass(eq=False)
class DumpJob:
    """`device_blocks` are all of the request's when the job was planned: what it copies depends on
    every one of them up to its own."""

    job_id: int
    blocks: list[int]
    device_blocks: DeviceBlocks
    generation: int
    ended: bool = False
    failed: bool = False

    def touches(self, device_blocks: set[int]) -> bool:
        return touches(self.device_blocks, device_blocks)


@dataclass(eq=False)
class StrandDump:
    """All that is said of its blocks is said in the `namespace` that it began in, though the engine
    may be in another one by then."""

    prompt: Prompt
    strand: int
    reach: Reach
    namespace: int
    cursor: DumpCursor
    jobs: deque[DumpJob] = field(default_factory=deque)
    closed: bool = False

    @property
    def is_base(self) -> bool:
        """Every block is kept, and one that is not ends it."""
        return not self.strand and self.reach == ALL

    def keys_of(self, blocks: Iterable[int]) -> list[Key]:
        return [self.prompt.key_of(block, self.strand) for block in blocks]

    def parents(self, blocks: Sequence[int]) -> list[bytes]:
        """The key before each block, empty for the first of the prompt, and of a window for its
        first: who waits for a window goes by its last page."""
        if self.is_base:
            return self.prompt.parents(blocks)
        return [
            self.prompt.key_of(block - 1, self.strand) if block - 1 in self.cursor.planned else b""
            for block in blocks
        ]


@dataclass(eq=False)
class RequestDump:
    """`device_blocks` are the request's as vLLM has named them last, and `states` where it has
    states in this step. Of the prompt it had `start_tokens`. `strands[0]` is the base, if there is
    one."""

    prompt: Prompt
    strands: list[StrandDump]
    start_tokens: int = 0
    device_blocks: DeviceBlocks = ()
    states: StateBlocks = field(default_factory=dict)
    # What is answered to the prompt, once it fills a block, in the same order.
    answer: list[StrandDump] = field(default_factory=list)

    @property
    def all_strands(self) -> list[StrandDump]:
        return [*self.strands, *self.answer]

    @property
    def is_done(self) -> bool:
        """Nothing is left to be copied."""
        return not any(dump.cursor.todo for dump in self.all_strands)

    @property
    def is_closed(self) -> bool:
        """Nothing of it is stored any more."""
        return self.strands[0].closed

    @property
    def leads_nowhere(self) -> bool:
        """The store will lack a full block of the prompt: what is answered would be found by nobody
        behind that."""
        return any(
            dump.is_base and dump.cursor.lost_from < dump.prompt.full_blocks
            for dump in self.strands
        )

    def offer(self, states: StateBlocks) -> None:
        """In this step the engine has these."""
        self.states = states
        for dump in self.strands:
            if isinstance(dump.cursor, StateCursor):
                dump.cursor.offer(states.keys())

    def kept_blocks(self, facts: EngineFacts, unsaved: Collection[bytes]) -> int:
        """How many leading blocks a receipt may promise: those of the base, if all that the other
        strands need to go on behind them is kept as well. The keys `unsaved` are not."""
        kept = self.strands[0].cursor.lost_from
        if unsaved and self.strands[0].is_base:
            keys = self.prompt.keys
            kept = next((block for block in range(kept) if keys[block] in unsaved), kept)
        prompt = self.prompt
        if not facts.has_states:
            end = min(prompt.tokens_before(kept), prompt.num_tokens - 1)
            return kept if self._goes_on_at(end, unsaved) else 0
        interval = facts.state_interval_tokens
        ends = boundaries(prompt.num_tokens, kept, prompt.block_tokens, interval, with_states=True)
        at = next((end for end in ends if self._goes_on_at(end, unsaved)), 0)
        return at // prompt.block_tokens

    def _goes_on_at(self, num_tokens: int, unsaved: Collection[bytes]) -> bool:
        """Whether all strands beside the base keep what is needed there."""
        for dump in self.strands:
            if dump.is_base:
                continue
            needed = needed_blocks(dump.reach, num_tokens, self.prompt.block_tokens)
            if not all(map(dump.cursor.is_kept, needed)):
                return False
            if unsaved and not set(dump.keys_of(needed)).isdisjoint(unsaved):
                return False
        return True

    def kept_with_answer(self, unsaved: Collection[bytes]) -> int:
        """How many leading blocks of the prompt with what is answered to it are kept; 0 if nothing
        of the answer is, or a strand keeps less than every block: then nobody has counted where one
        can go on."""
        start, dumps = self.prompt.full_blocks, self.all_strands
        if not self.answer or any(dump.reach != ALL for dump in dumps):
            return 0
        if any(dump.cursor.first_lost < start for dump in self.strands):
            return 0
        kept = min(dump.cursor.first_lost for dump in self.answer)
        for dump in self.answer if unsaved else ():
            keys = dump.keys_of(range(kept))
            kept = next((block for block in range(kept) if keys[block] in unsaved), kept)
        return kept if kept > start else 0


def touches(groups: DeviceBlocks, device_blocks: set[int]) -> bool:
    """Whether any of these is among a request's."""
    return any(not device_blocks.isdisjoint(group) for group in groups)


def parts_of(
    dump: StrandDump, taken: Sequence[SlotOfBlock], of_request: RequestDump, facts: EngineFacts
) -> tuple[tuple[PagePart, ...], list[int], list[int]]:
    """The copies of `taken`; the blocks that they are of; and those that vLLM has taken back."""
    targets = [
        (number, target)
        for number, target in enumerate(facts.targets)
        if target.strand == dump.strand
    ]
    prompt, groups = dump.prompt, of_request.device_blocks
    parts: list[PagePart] = []
    copied: list[int] = []
    gone: list[int] = []
    for each in taken:
        if dump.reach == STATE:
            of_block = parts_of_state(each, of_request.states.get(each.block, {}), targets)
        else:
            of_block = [
                part_of_block(
                    each.block,
                    each.offset,
                    groups[target.group],
                    num_tokens=prompt.tokens_of(each.block),
                    block_tokens=prompt.block_tokens,
                    unit=target.block_tokens,
                    target=number,
                )
                for number, target in targets
            ]
        if dump.reach != ALL and any(NULL_BLOCK in part.block_ids for part in of_block):
            gone.append(each.block)
        else:
            copied.append(each.block)
            parts += of_block
    return tuple(parts), copied, gone
