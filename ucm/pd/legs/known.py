"""Which prompts were prefilled lately, so that what begins with one goes to decode alone.

A prompt is a chain of parts: messages, or stretches of text or of token ids. Each digest in it
names all that stands before its end, with every field of the request that may shape the prompt. So
the longest digest that is known says how much of a prompt is in the store, and what is behind it is
what decode has to compute.

Known are prompts for which a prefill gave a receipt of our store for the whole, for a while: pages
may be dropped, and only a prefill says anew that they are there. That costs time when it is wrong,
and nothing else: decode computes what it does not find. What decode has computed is not noted: it
may not store anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from xxhash import xxh3_128

from ucm import handoff
from ucm.pd.legs import bodies
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
    is behind it."""

    digest: bytes
    rest_tokens: int


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
    for part in parts:
        written = bodies.encode(part)
        # Its length first: what follows one part is never taken for its end.
        digest.update(len(written).to_bytes(8, "little") + written)
        digests.append(digest.digest())
        tokens.append(max(1, guess(part)))  # whatever is new is something
    links, rest = [], 0
    for each, new in zip(reversed(digests), reversed(tokens), strict=True):
        links.append(Link(each, rest))
        rest += new
    return tuple(links)


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
        # Those that were noted last are at the end.
        self._until_s: dict[bytes, float] = {}

    def __len__(self) -> int:
        return len(self._until_s)

    def has_nearly_all(self, chain: Sequence[Link]) -> bool:
        """Whether what is new in this prompt is little enough for decode."""
        now_s = self._clock()
        for link in chain:
            if link.rest_tokens > self._max_new_tokens:
                return False
            if self._until_s.get(link.digest, 0.0) > now_s:
                return True
        return False

    def note(self, chain: Sequence[Link], outcome: PrefillOutcome | None) -> None:
        """What has become of this prompt's prefill."""
        if not self.is_on or not _is_all_there(outcome):
            return
        until_s = self._clock() + self._for_s
        for link in reversed(chain[:_MAX_NOTED]):
            self._until_s.pop(link.digest, None)
            self._until_s[link.digest] = until_s
        while len(self._until_s) > self._max_known:
            del self._until_s[next(iter(self._until_s))]


def _is_all_there(outcome: PrefillOutcome | None) -> bool:
    """Other connectors' receipts are for one decode, and say nothing of a store."""
    if outcome is None or outcome.failure is not None or outcome.receipt is None:
        return False
    words = handoff.parse(msgspec.json.decode(outcome.receipt))
    return isinstance(words, handoff.Receipt) and words.is_whole
