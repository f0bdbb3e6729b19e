"""Which prompts were prefilled lately, so that what begins with one goes to decode alone.

The longest digest of a prompt's chain (`chains`) that is known says how much of it is in the store,
and what is behind it is what decode has to compute.

Known are prompts for which a prefill gave a receipt of our store for the whole, for a while: pages
may be dropped, and only a receipt says anew that they are there. That costs time when it is wrong,
and nothing else: decode computes what it does not find. Of prompts of ids decode gives receipts as
well, with their answers.

What was answered to a known prompt stands behind it in the next turn's. Whether decode stores it as
a chat's template writes it only prefill can tell: by a receipt that it has found more than the
prompt before. From then on answers count as known too, until a receipt says otherwise; and no more
than has gone through the proxy to that very prompt, for a client may write there what it likes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from ucm import handoff
from ucm.handoff import Receipt
from ucm.pd.legs.chains import Link, Mark, num_ids
from ucm.pd.legs.ends import Ends
from ucm.pd.legs.prefill import PrefillOutcome

# Of one prompt; the ends of chats and documents are what others begin with.
_MAX_NOTED = 256


class _Noted(NamedTuple):
    """A beginning that is known. `tokens` are told of whole prompts only; of others it is 1. The
    longest answer to it that decode gave had `answer_tokens`, a guess."""

    until_s: float
    tokens: int
    answer_tokens: int

    def kept_of(self, link: Link) -> int:
        """How much of the answer that stands behind it in a prompt decode may have stored."""
        return min(link.answer_tokens, self.answer_tokens)


class Known:
    """The latest `max_known` of them, each for `for_s` from its prefill on; without that there are
    none. Owned by the event loop's thread."""

    def __init__(
        self,
        *,
        for_s: float | None,
        max_new_tokens: int,
        max_known: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.is_on = for_s is not None
        self._for_s = for_s or 0.0
        self._max_new_tokens = max_new_tokens
        self._max_known = max_known
        self._clock = clock
        # Those that were noted last are at the end.
        self._noted: dict[bytes, _Noted] = {}
        self._ends = Ends(max_known)
        # What decode has answered is found by prefill.
        self._answers_are_kept = False

    def __len__(self) -> int:
        return max(len(self._noted), len(self._ends))

    def has_nearly_all(self, chain: Sequence[Link], marks: Sequence[Mark] = ()) -> bool:
        """Whether what is new in this prompt is little enough for decode."""
        now_s = self._clock()
        stored = self._ends.stored_tokens(marks, now_s=now_s)
        if stored and num_ids(marks) - stored <= self._max_new_tokens:
            return True
        for link in chain:
            noted = self._find(link, now_s)
            if noted is None:
                continue
            kept = noted.kept_of(link) if self._answers_are_kept else 0
            if link.rest_tokens - kept <= self._max_new_tokens:
                return True
        return False

    def note(
        self, chain: Sequence[Link], outcome: PrefillOutcome | None, *, answer_tokens: int = 0
    ) -> None:
        """What has become of this prompt's prefill, and how much decode has answered."""
        receipt = _receipt_for_all(outcome)
        if not self.is_on or receipt is None or not chain:
            return
        now_s = self._clock()
        self._learn(chain, receipt, now_s)
        until_s = now_s + self._for_s
        for link in reversed(chain[1:_MAX_NOTED]):
            self._remember(link, _Noted(until_s, 1, 0), now_s)
        self._remember(chain[0], _Noted(until_s, receipt.tokens, answer_tokens), now_s)
        self._drop_oldest()

    def answered(
        self, marks: Sequence[Mark], stored_tokens: int, answer_ids: Sequence[int] = ()
    ) -> None:
        """Decode says that so much of this prompt and its answer is stored."""
        if self.is_on and stored_tokens:
            until_s = self._clock() + self._for_s
            self._ends.note(marks, answer_ids, stored_tokens, until_s=until_s)

    def went_on(self, chain: Sequence[Link], *, answer_tokens: int = 0) -> None:
        """Decode alone has answered this one, of which nearly all was known. If it keeps answers it
        keeps what else it computes, for as long as what that goes on from."""
        now_s = self._clock()
        known = next((link for link in chain if self._find(link, now_s)), None)
        if known is None or not self._answers_are_kept:
            return
        before = self._noted[known.digest]
        for link in reversed(chain[1 : chain.index(known)][: _MAX_NOTED - 1]):
            self._remember(link, _Noted(before.until_s, 1, 0), now_s)
        tokens = before.tokens if known is chain[0] else 1
        self._remember(chain[0], _Noted(before.until_s, tokens, answer_tokens), now_s)
        self._drop_oldest()

    def _remember(self, link: Link, noted: _Noted, now_s: float) -> None:
        before = self._find(link, now_s)
        if before is not None and before.answer_tokens > noted.answer_tokens:
            noted = noted._replace(answer_tokens=before.answer_tokens)
        self._noted.pop(link.digest, None)
        self._noted[link.digest] = noted

    def _drop_oldest(self) -> None:
        while len(self._noted) > self._max_known:
            del self._noted[next(iter(self._noted))]

    def _find(self, link: Link, now_s: float) -> _Noted | None:
        noted = self._noted.get(link.digest)
        return noted if noted is not None and noted.until_s > now_s else None

    def _learn(self, chain: Sequence[Link], receipt: Receipt, now_s: float) -> None:
        """A turn that goes on with a prompt of which all tokens are known tells whether what was
        answered to it was found. An answer that fills no block tells nothing, and what nobody has
        answered neither."""
        for link in chain:
            before = self._find(link, now_s)
            if before is None or before.tokens <= 1:
                continue
            if before.kept_of(link) >= 2 * receipt.block_tokens:
                self._answers_are_kept = receipt.found_tokens > before.tokens
                return


def _receipt_for_all(outcome: PrefillOutcome | None) -> Receipt | None:
    """Other connectors' receipts are for one decode, and say nothing of a store."""
    if outcome is None or outcome.failure is not None or outcome.receipt is None:
        return None
    words = handoff.parse(msgspec.json.decode(outcome.receipt))
    return words if isinstance(words, Receipt) and words.is_whole else None
