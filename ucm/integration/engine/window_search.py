"""Where a prompt can go on of a model that has no strand with every block: all layers have windows.

Of what is stored only the windows before some boundaries are there, and whose prompt that was need
not be known: a conversation goes on where the prompt before ended. A window has blocks in a row,
so first every so-manyth block is looked for that each window has one of, and then all around the
last that is there. What is found are likely ends of a hit, which are asked for in full then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from ucm.integration.engine.prompt import Prompt
from ucm.outcome import Outcome
from ucm.store.blocks.hit_ends import likely_ends
from ucm.store.blocks.strands import Reach
from ucm.store.client.session import NodeSession
from ucm.store.node import protocol as p

# Of messages, each of which storage may have to answer.
_MAX_ROUNDS: Final = 4


def sampled_blocks(reach: Reach, blocks: range, block_tokens: int) -> list[int]:
    """Of these blocks so many that whoever has what a boundary needs of them has one of these."""
    stride = max(1, -(-(reach.num_tokens - 1) // block_tokens))
    return sorted({*blocks[:1], *range(-(-blocks.start // stride) * stride, blocks.stop, stride)})


@dataclass(eq=False)
class WindowSearch:
    """Of one lookup, for the strand with the longest window. `on_ends` gets the likely ends, and
    why there may be more that nobody knows of. What is promised is not looked for: it is waited
    for, if that is `renewed` boundary by boundary. Ends with the release of its lookup. Owned by
    the engine's thread."""

    session: NodeSession
    lookup_id: int
    reach: Reach
    prompt: Prompt
    read_from: int
    own_ends: Sequence[int]
    promised_blocks: int
    renewed: bool
    timeout_s: float
    on_ends: Callable[[list[int], Outcome], None]
    _found: set[int] = field(default_factory=set)
    _absent: set[int] = field(default_factory=set)
    # Samples that are there, around which nothing was asked for yet.
    _ahead: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = self.prompt.block_tokens
        if not self.promised_blocks:
            self._ask(sampled_blocks(self.reach, self._blocks, size), self._on_samples)
            return
        ends = [self.prompt.tokens_before(self.promised_blocks), *self.own_ends]
        if self.renewed:
            begin = self.read_from * size
            self._watch([end for end in ends[1:] if begin < end <= ends[0]], seen=[])
        else:
            self.on_ends(ends, Outcome.FINE)

    def _watch(self, ahead: list[int], *, seen: list[int]) -> None:
        """Prefill is under way, and keeps a window at each of these boundaries, which shows that it
        goes on. Of each the last page is waited for, as it comes last."""
        if not ahead:
            self.on_ends(seen, Outcome.FINE)
            return
        *ahead, nearest = ahead
        stop = -(-nearest // self.prompt.block_tokens)
        self.session.ask(
            p.Lookup(
                id=self.lookup_id,
                ns=self.session.namespace,
                keys=[self.prompt.key_of(stop - 1)],
                read_from=0,
                load=True,
                timeout_ms=int(self.timeout_s * 1000),
                promised=1,
                tail_tokens=self.prompt.tail_at(stop),
            ),
            partial(self._on_watched, ahead, [nearest, *seen]),
        )

    def _on_watched(self, ahead: list[int], seen: list[int], reply: p.LookupReply) -> None:
        self.session.release(self.lookup_id)
        if reply.offsets:
            self._watch(ahead, seen=seen)
        else:
            self.on_ends(seen[1:], reply.reason)

    @property
    def _blocks(self) -> range:
        """Those to look for. A tail has another name: a lookup of it tells whether it is there."""
        num_whole = len(self.prompt.keys) - bool(self.prompt.tail_tokens)
        return range(min(self.read_from, num_whole), num_whole)

    def _ask(self, blocks: list[int], then: Callable[[Outcome], None]) -> None:
        if not blocks:
            then(Outcome.FINE)
            return
        self.session.ask(
            p.Find(
                id=self.lookup_id,
                ns=self.session.namespace,
                keys=[self.prompt.key_of(block) for block in blocks],
                storage=False,
                timeout_ms=int(self.timeout_s * 1000),
            ),
            partial(self._on_found, blocks, then),
        )

    def _on_found(self, blocks: list[int], then: Callable[[Outcome], None], found: p.Found) -> None:
        for block, place in zip(blocks, found.places, strict=True):
            (self._found if place else self._absent).add(block)
        then(found.reason)

    def _on_samples(self, reason: Outcome) -> None:
        self._ahead = sorted(self._found)[-_MAX_ROUNDS:]
        self._go_on(reason)

    def _go_on(self, reason: Outcome) -> None:
        """Around the last sample that is there, all up to those beside it; around the one before,
        if that is nobody's window any more."""
        blocks, known = self._blocks, self._found | self._absent
        if self._ahead:
            last = self._ahead.pop()
            begin = max((each for each in known if each < last), default=blocks.start - 1) + 1
            stop = min((each for each in known if each > last), default=blocks.stop)
            self._ask([*range(begin, last), *range(last + 1, stop)], self._on_around)
        else:
            self._end(reason)

    def _on_around(self, reason: Outcome) -> None:
        if self._likely_ends():
            self._end(reason)
        else:
            self._go_on(reason)

    def _end(self, reason: Outcome) -> None:
        self.on_ends(self._likely_ends(), reason)

    def _likely_ends(self) -> list[int]:
        return likely_ends(
            self.reach,
            self.own_ends,
            found=self._found,
            absent=self._absent,
            block_tokens=self.prompt.block_tokens,
            first_block=self._blocks.start,
        )
