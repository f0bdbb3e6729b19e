"""How far a hit can go in strands of which only some blocks are kept: windows and chunks.

A hit ends at a boundary, where every strand has what the next token needs. The longest that the
base has is tried first; where a strand lacks a block, the next is the longest boundary that can do
without it. What a boundary needs is pinned, as the base's pages are, or nothing of it. Without a
base those are tried that are likely to be there (`window_search.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from ucm.integration.engine.facts import EngineFacts
from ucm.integration.engine.prompt import Prompt
from ucm.outcome import Outcome
from ucm.store.blocks.hit_ends import MAX_TRIES, end_before
from ucm.store.blocks.strands import needed_blocks
from ucm.store.client.session import NodeSession
from ucm.store.node import protocol as p


@dataclass(frozen=True)
class SideWaits:
    """Answers are due by `until_s` (monotonic). The first `promised_blocks` of the prompt are on
    their way: what is needed where they end is waited for, and nothing at a boundary before. That
    was published earlier, or is kept by nobody: prefill may have another interval."""

    until_s: float
    promised_blocks: int


@dataclass(eq=False)
class _SideQuestion:
    """`offsets[i]` of the reply is the slot of block `first + i`."""

    lookup_id: int
    strand: int
    first: int
    num_blocks: int
    reply: p.LookupReply | None = None

    @property
    def missing(self) -> int | None:
        """The first block that can't be had."""
        assert self.reply is not None
        found = len(self.reply.offsets)
        return None if found == self.num_blocks else self.first + found


@dataclass(eq=False)
class SideLookups:
    """Of one hit, of which vLLM has the first `read_from` blocks itself. The first of `ends`, which
    are numbers of tokens, is tried first, then those before it, the longest first. Owned by the
    engine's thread; `release` gives back what is pinned. `end_tokens` is how far vLLM can be told
    to go, 0 for nothing."""

    session: NodeSession
    facts: EngineFacts
    prompt: Prompt
    read_from: int
    ends: Sequence[int]
    waits: SideWaits
    # Told by how many blocks the hit is shorter, and why.
    on_shorter: Callable[[int, Outcome], None]
    # Why the base has no more. What is lost by that is as well what no strand keeps where it ends.
    why_shorter: Outcome = Outcome.FINE
    on_settled: Callable[[], None] = lambda: None
    is_settled: bool = False
    end_tokens: int = 0
    _asked: list[_SideQuestion] = field(default_factory=list)
    _tries: int = 0

    def __post_init__(self) -> None:
        self._try(self.ends[0] if self.ends else 0)

    def offsets(self, strand: int) -> dict[int, int]:
        return {
            asked.first + i: offset
            for asked in self._asked
            if asked.strand == strand and asked.reply is not None
            for i, offset in enumerate(asked.reply.offsets)
        }

    def pages_from_files(self) -> tuple[int, int]:
        """Of how many pages in all."""
        replies = [asked.reply for asked in self._asked if asked.reply is not None]
        return sum(each.from_files for each in replies), sum(len(each.offsets) for each in replies)

    def release(self) -> None:
        for asked in self._asked:
            if asked.reply is None or asked.reply.offsets:
                self.session.release(asked.lookup_id)
        self._asked = []

    def _try(self, boundary: int) -> None:
        """Asks for all that is needed at the boundary, which is a number of tokens."""
        prompt = self.prompt
        self._tries += 1
        # vLLM computes the last token in any case. A boundary of states leaves it one.
        self.end_tokens = min(boundary, prompt.num_tokens - 1)
        if self.end_tokens <= self.read_from * prompt.block_tokens:
            self.end_tokens = 0
            self._settle()
            return
        for strand in range(int(self.facts.has_base), len(self.facts.strands)):
            reach = self.facts.strands[strand].reach
            needed = needed_blocks(reach, self.end_tokens, prompt.block_tokens)
            first = max(needed.start, self.read_from)
            asked = _SideQuestion(self.session.next_id(), strand, first, needed.stop - first)
            self._asked.append(asked)
        self._asked = [asked for asked in self._asked if asked.num_blocks > 0]
        if not self._asked:
            self._settle()
        promised_blocks = self._promised_at(boundary)
        for asked in list(self._asked):
            self._ask(asked, promised_blocks)

    def _ask(self, asked: _SideQuestion, promised_blocks: int) -> None:
        prompt, stop = self.prompt, asked.first + asked.num_blocks
        left_s = max(0.0, self.waits.until_s - time.monotonic())
        self.session.ask(
            p.Lookup(
                id=asked.lookup_id,
                ns=self.session.namespaces[asked.strand],
                keys=[prompt.key_of(block, asked.strand) for block in range(asked.first, stop)],
                read_from=0,
                load=True,
                timeout_ms=int(left_s * 1000),
                promised=max(0, min(stop, promised_blocks) - asked.first),
                tail_tokens=prompt.tail_at(stop),
            ),
            partial(self._on_reply, asked),
        )

    def _on_reply(self, asked: _SideQuestion, reply: p.LookupReply) -> None:
        if asked not in self._asked:
            return
        asked.reply = reply
        if any(each.reply is None for each in self._asked):
            return
        missing = [each.missing for each in self._asked if each.missing is not None]
        if not missing:
            self._settle()
            return
        reasons = [each.reply.reason for each in self._asked if each.reply and each.reply.reason]
        self.release()
        block_tokens = self.prompt.block_tokens
        end_tokens = self._boundary_before(min(missing) * block_tokens)
        lost_tokens = self.end_tokens - max(end_tokens, self.read_from * block_tokens)
        # All that is lost by it, though at the boundary before nobody may have kept anything.
        if self.why_shorter in (Outcome.FINE, Outcome.NEVER_STORED):
            self.why_shorter = reasons[0]
        self.on_shorter(-(-lost_tokens // block_tokens), self.why_shorter)
        self._try(end_tokens)

    def _settle(self) -> None:
        self.is_settled = True
        self.on_settled()

    def _promised_at(self, boundary: int) -> int:
        """Of strands that keep all, every block. Where the base ends before what is promised, at no
        boundary, no prefill keeps a window."""
        promised = self.waits.promised_blocks
        is_end = -(-boundary // self.prompt.block_tokens) == promised
        return promised if self.facts.is_plain or is_end else 0

    def _boundary_before(self, num_tokens: int) -> int:
        """The longest that needs nothing behind so many tokens, which are whole blocks."""
        if self._tries >= MAX_TRIES or time.monotonic() >= self.waits.until_s:
            return 0
        is_plain = self.facts.is_plain
        return end_before(self.ends, self.end_tokens, missing=num_tokens, is_plain=is_plain)
