"""What of one request's prompt goes into the store, strand by strand (ucm/store/blocks/strands.py).

Each strand has pages, slots and a cursor of its own. The blocks of the base are dumped as the
prompt grows. Of another strand only some blocks are kept, and vLLM takes its device blocks back
while the request runs: one whose slot comes too late is a hole, and the rest goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from ucm.integration.copies.jobs import PagePart
from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.prompt import Prompt
from ucm.integration.engine.ranges import DumpCursor, SlotOfBlock, part_of_block
from ucm.store.blocks.keys import Key
from ucm.store.blocks.strands import needed_blocks

# vLLM's block that stands for those that a request has no more, or never had.
NULL_BLOCK = 0

# Of each of the engine's groups, the device blocks of a request.
DeviceBlocks = Sequence[Sequence[int]]


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
    namespace: int
    cursor: DumpCursor
    jobs: deque[DumpJob] = field(default_factory=deque)
    closed: bool = False

    def keys_of(self, blocks: Iterable[int]) -> list[Key]:
        return [self.prompt.key_of(block, self.strand) for block in blocks]

    def parents(self, blocks: Sequence[int]) -> list[bytes]:
        """The key before each block, empty for the first of the prompt, and in another strand than
        the base for the first of a window: who waits for a window goes by its last page."""
        if not self.strand:
            return self.prompt.parents(blocks)
        return [
            self.prompt.key_of(block - 1, self.strand) if block - 1 in self.cursor.planned else b""
            for block in blocks
        ]


@dataclass(eq=False)
class RequestDump:
    """`device_blocks` are the request's as vLLM has named them last. `strands[0]` is the base."""

    prompt: Prompt
    strands: list[StrandDump]
    device_blocks: DeviceBlocks = ()

    @property
    def is_done(self) -> bool:
        """Nothing is left to be copied."""
        return not any(dump.cursor.todo for dump in self.strands)

    def kept_blocks(self, facts: EngineFacts, unsaved: Collection[bytes]) -> int:
        """How many leading blocks a receipt may promise: those of the base, if all that the other
        strands need to go on behind them is kept as well. The keys `unsaved` are not."""
        kept = self.strands[0].cursor.lost_from
        if unsaved:
            keys = self.prompt.keys
            kept = next((block for block in range(kept) if keys[block] in unsaved), kept)
        num_tokens = min(kept * self.prompt.block_tokens, self.prompt.num_tokens)
        for dump in self.strands[1:]:
            needed = needed_blocks(
                facts.strands[dump.strand].reach,
                min(num_tokens, self.prompt.num_tokens - 1),
                self.prompt.block_tokens,
            )
            if not all(map(dump.cursor.is_kept, needed)):
                return 0
            if unsaved and not set(dump.keys_of(needed)).isdisjoint(unsaved):
                return 0
        return kept


def touches(groups: DeviceBlocks, device_blocks: set[int]) -> bool:
    """Whether any of these is among a request's."""
    return any(not device_blocks.isdisjoint(group) for group in groups)


def parts_of(
    dump: StrandDump, taken: Sequence[SlotOfBlock], groups: DeviceBlocks, facts: EngineFacts
) -> tuple[tuple[PagePart, ...], list[int], list[int]]:
    """The copies of `taken`; the blocks that they are of; and those that vLLM has taken back."""
    targets = [
        (number, target)
        for number, target in enumerate(facts.targets)
        if target.strand == dump.strand
    ]
    prompt = dump.prompt
    parts: list[PagePart] = []
    copied: list[int] = []
    gone: list[int] = []
    for each in taken:
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
        if dump.strand and any(NULL_BLOCK in part.block_ids for part in of_block):
            gone.append(each.block)
        else:
            copied.append(each.block)
            parts += of_block
    return tuple(parts), copied, gone
