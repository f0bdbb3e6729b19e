"""Where a prompt can go on of a model that has no strand with every block: all layers have windows.

Of what is stored only the windows before some boundaries are there, and whose prompt that was need
not be known: a conversation goes on where the prompt before ended. A window has blocks in a row,
so first every so-manyth block is looked for that each window has one of, and then all behind the
last that is there. What is found are likely ends of a hit, which are asked for in full then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from ucm.integration.engine.prompt import Prompt
from ucm.outcome import Outcome
from ucm.store.blocks.strands import Reach, needed_blocks
from ucm.store.client.session import NodeSession
from ucm.store.node import protocol as p


def sampled_blocks(reach: Reach, blocks: range, block_tokens: int) -> list[int]:
    """Of these blocks so many that whoever has what a boundary needs of them has one of these."""
    stride = max(1, -(-(reach.num_tokens - 1) // block_tokens))
    return sorted({*blocks[:1], *range(-(-blocks.start // stride) * stride, blocks.stop, stride)})


def likely_ends(
    reach: Reach,
    own_ends: Sequence[int],
    *,
    found: Collection[int],
    absent: Collection[int],
    block_tokens: int,
) -> list[int]:
    """Of the prompt's own boundaries, and of the ends of blocks that are `found`, those that need
    none that is `absent`. The longest first."""
    ends = {*own_ends, *((block + 1) * block_tokens for block in found)}
    lacking = frozenset(absent)
    return [
        end
        for end in sorted(ends, reverse=True)
        if lacking.isdisjoint(needed_blocks(reach, end, block_tokens))
    ]


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

    def __post_init__(self) -> None:
        size = self.prompt.block_tokens
        if not self.promised_blocks:
            self._ask(sampled_blocks(self.reach, self._blocks, size), self._go_on)
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

    def _go_on(self, reason: Outcome) -> None:
        """Behind the last sample that is there, all up to the next."""
        if not self._found:
            self._end(reason)
            return
        last = max(self._found)
        stop = min((each for each in self._absent if each > last), default=self._blocks.stop)
        self._ask(list(range(last + 1, stop)), self._end)

    def _end(self, reason: Outcome) -> None:
        ends = likely_ends(
            self.reach,
            self.own_ends,
            found=self._found,
            absent=self._absent,
            block_tokens=self.prompt.block_tokens,
        )
        self.on_ends(ends, reason)
