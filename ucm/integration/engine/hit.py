"""What the store has of one request's prompt: a lookup, and what it has brought."""

from __future__ import annotations

from dataclasses import dataclass

from ucm.integration.engine.prompt import Prompt
from ucm.integration.engine.receipt import Promise
from ucm.integration.engine.side_lookups import SideLookups
from ucm.outcome import Outcome
from ucm.store.node import protocol as p


@dataclass(eq=False)
class RequestLookups:
    """Those of one request: why the last has brought no more (FINE: it has brought all), and
    whether there will be none any more."""

    reason: Outcome = Outcome.FINE
    no_loads: bool = False

    def end(self, reason: Outcome) -> None:
        self.reason, self.no_loads = reason, True


@dataclass(eq=False)
class Hit:
    """One lookup. `offsets[i]` is the slot of block `read_from + i`, once answered. `promise`: that
    which it was asked with."""

    prompt: Prompt
    of_request: RequestLookups
    promise: Promise | None
    lookup_id: int
    generation: int
    read_from: int
    asked_s: float
    overdue_s: float
    is_last_wait: bool = False
    reply: p.LookupReply | None = None
    # Of the strands beside the base, in an engine that has any. Without a base `reply` says nothing
    # of any block, and these are of all.
    sides: SideLookups | None = None

    @property
    def is_settled(self) -> bool:
        return self.reply is not None and (self.sides is None or self.sides.is_settled)

    @property
    def pins_nothing(self) -> bool:
        return self.reply is not None and not self.reply.offsets

    @property
    def end_tokens(self) -> int:
        if self.sides is not None:
            return self.sides.end_tokens
        count = len(self.reply.offsets) if self.reply is not None else 0
        return (self.read_from + count) * self.prompt.block_tokens

    def offsets(self, strand: int) -> dict[int, int]:
        """The slots of a strand's blocks."""
        if self.sides is not None and (strand or not self.sides.facts.has_base):
            return self.sides.offsets(strand)
        assert self.reply is not None
        return {self.read_from + i: offset for i, offset in enumerate(self.reply.offsets)}

    def tokens_from_files(self, num_tokens: int) -> int:
        """Of so many that are loaded. Without a base, the share of the pages that were read."""
        assert self.reply is not None
        if self.sides is not None and not self.sides.facts.has_base:
            read, pages = self.sides.pages_from_files()
            return num_tokens * read // max(1, pages)
        return min(num_tokens, self.reply.from_files * self.prompt.block_tokens)
