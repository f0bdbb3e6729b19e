"""Which prompts were prefilled lately, so that what begins with one goes to decode alone.

A prompt is a chain of parts: messages, or stretches of text or of token ids. Each digest in it
names all that stands before its end, with every field of the request that may shape the prompt. So
the longest digest that is known says how much of a prompt is in the store, and what is behind it is
what decode has to compute.

Known are prompts for which a prefill gave a receipt of our store for the whole, for a while: pages
may be dropped, and only a receipt says anew that they are there. That costs time when it is wrong,
and nothing else: decode computes what it does not find. Of prompts of ids decode gives receipts as
well, with their answers.

What was answered to a known prompt stands behind it in the next turn's. Whether decode stores it as
a chat's template writes it only prefill can tell: by a receipt that it has found more than the
prompt before. From then on answers count as known too, until a receipt says otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from xxhash import xxh3_128

from ucm import handoff
from ucm.handoff import Receipt
from ucm.pd.fleet.affinity import Prefix
from ucm.pd.legs import bodies
from ucm.pd.legs.ends import Ends, Mark, num_ids
from ucm.pd.legs.prefill import PrefillOutcome
from ucm.pd.legs.rewrite import guess

# The one of them that a request has is its prompt, but for what stands before it.
_PROMPTS = ("messages", "input", "token_ids", "prompt")
_TEXT_PART_CHARS = 1024
_IDS_PART = 256
# They shape the output alone.
_NOT_OF_THE_PROMPT = frozenset(
    {"temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "user"}
    | {"max_tokens", "max_completion_tokens", "max_output_tokens", "n", "stream", "request_id"}
    | {"kv_transfer_params"}
)
# Of one prompt; the ends of chats and documents are what others begin with.
_MAX_NOTED = 256


@dataclass(frozen=True)
class Link:
    """The beginning of a prompt up to the end of one of its parts. `rest_tokens` is a guess at what
    is behind it, and `answer_tokens` of that at what was answered to it."""

    digest: bytes
    rest_tokens: int
    answer_tokens: int = 0


def chain_of(first: Mapping[str, Any], *, path: str) -> tuple[Link, ...]:
    """Of the fields of a prefill leg, longest first. Empty for several prompts in one request, and
    for none. Pure."""
    name = next((name for name in _PROMPTS if first.get(name) is not None), "")
    parts = list(_parts(first.get(name)))
    # Inside of them order may count: tools end up in the prompt as they are written.
    names = sorted(first.keys() - _NOT_OF_THE_PROMPT - {name})
    around = bodies.encode([(each, first[each]) for each in names])
    digest = xxh3_128(path.encode(errors="surrogateescape") + b"\0" + around)
    digests, tokens = [], []
    answers = [_is_answer(part) for part in parts]
    for part in parts:
        written = bodies.encode(part)
        # Its length first: what follows one part is never taken for its end.
        digest.update(len(written).to_bytes(8, "little") + written)
        digests.append(digest.digest())
        tokens.append(max(1, guess(part)))  # whatever is new is something
    links, rest, answer = [], 0, 0
    for each, new, is_answer in zip(
        reversed(digests), reversed(tokens), reversed(answers), strict=True
    ):
        links.append(Link(each, rest, answer))
        rest, answer = rest + new, new if is_answer else 0
    return tuple(links)


def marks_of(first: Mapping[str, Any], chain: Sequence[Link]) -> tuple[Mark, ...]:
    """Of a prompt of ids, longest first, of the same fields; no other has any. Pure."""
    ids = next((first[name] for name in _PROMPTS if first.get(name) is not None), None)
    if not isinstance(ids, list) or not ids or type(ids[0]) is not int:
        return ()
    ends = range(_IDS_PART, len(ids) + 1, _IDS_PART)
    # The last link may be that of a part that is not whole.
    links = reversed(chain)
    marks = [
        Mark(link.digest, end, ids[end : end + _IDS_PART])
        for link, end in zip(links, ends, strict=False)
    ]
    return tuple(reversed(marks))


def prefix_of(first: Mapping[str, Any], chain: Sequence[Link]) -> Prefix | None:
    """Of the same fields: where it lies. A conversation's opening ends with what its user says
    first; that of a text or of ids with their first part. Pure."""
    if not chain:
        return None
    messages = first.get("messages") or first.get("input")
    asked = 0
    if isinstance(messages, list):
        roles = [each.get("role") if isinstance(each, dict) else None for each in messages]
        asked = roles.index("user") if "user" in roles else 0
    digests = [link.digest for link in chain[: len(chain) - asked]]
    return Prefix(digests, digests[-1])


def _is_answer(part: object) -> bool:
    return isinstance(part, dict) and part.get("role") == "assistant"


def _parts(prompt: object) -> Iterator[Any]:
    if isinstance(prompt, str):
        step = _TEXT_PART_CHARS
        yield from (prompt[i : i + step] for i in range(0, len(prompt), step))
    elif isinstance(prompt, list) and all(type(each) is int for each in prompt):
        yield from (prompt[i : i + _IDS_PART] for i in range(0, len(prompt), _IDS_PART))
    elif isinstance(prompt, list) and all(isinstance(each, dict) for each in prompt):
        yield from prompt


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
        # Those that were noted last are at the end: until when, and how many tokens it has.
        self._noted: dict[bytes, tuple[float, int]] = {}
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
            kept = link.answer_tokens if self._answers_are_kept else 0
            if link.rest_tokens - kept <= self._max_new_tokens and self._tokens(link, now_s):
                return True
        return False

    def note(self, chain: Sequence[Link], outcome: PrefillOutcome | None) -> None:
        """What has become of this prompt's prefill."""
        receipt = _receipt_for_all(outcome)
        if not self.is_on or receipt is None:
            return
        now_s = self._clock()
        self._learn(chain, receipt, now_s)
        for link in reversed(chain[:_MAX_NOTED]):
            self._noted.pop(link.digest, None)
            # Only the whole prompt's are told.
            tokens = receipt.tokens if link is chain[0] else 1
            self._noted[link.digest] = now_s + self._for_s, tokens
        self._drop_oldest()

    def answered(self, marks: Sequence[Mark], stored_tokens: int) -> None:
        """Decode says that so much of this prompt and its answer is stored."""
        if self.is_on and stored_tokens:
            until_s = self._clock() + self._for_s
            self._ends.note(marks, stored_tokens, until_s=until_s)

    def went_on(self, chain: Sequence[Link]) -> None:
        """Decode alone has answered this one, of which nearly all was known. If it keeps answers it
        keeps what else it computes, for as long as what that goes on from."""
        now_s = self._clock()
        known = next((link for link in chain if self._tokens(link, now_s)), None)
        if known is None or not self._answers_are_kept:
            return
        until_s, _ = self._noted[known.digest]
        for link in reversed(chain[: chain.index(known)][:_MAX_NOTED]):
            self._noted[link.digest] = until_s, 1
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        while len(self._noted) > self._max_known:
            del self._noted[next(iter(self._noted))]

    def _tokens(self, link: Link, now_s: float) -> int:
        """Of one that is known, else 0."""
        until_s, tokens = self._noted.get(link.digest, (0.0, 0))
        return tokens if until_s > now_s else 0

    def _learn(self, chain: Sequence[Link], receipt: Receipt, now_s: float) -> None:
        """A turn that goes on with a prompt of which all tokens are known tells whether what was
        answered to it was found. An answer that fills no block tells nothing."""
        for link in chain:
            before = self._tokens(link, now_s)
            if before > 1 and link.answer_tokens >= 2 * receipt.block_tokens:
                self._answers_are_kept = receipt.found_tokens > before
                return


def _receipt_for_all(outcome: PrefillOutcome | None) -> Receipt | None:
    """Other connectors' receipts are for one decode, and say nothing of a store."""
    if outcome is None or outcome.failure is not None or outcome.receipt is None:
        return None
    words = handoff.parse(msgspec.json.decode(outcome.receipt))
    return words if isinstance(words, Receipt) and words.is_whole else None
