"""A client's request as far as the proxy has to understand it. Pure.

All that takes longer with a longer body is done here, so that it can be done apart from the event
loop: reading it, taking out what is not a client's to say, guessing, and writing the prefill leg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ucm.pd.fleet.affinity import Prefix
from ucm.pd.legs.chains import Link, Mark, chain_of, marks_of, prefix_of
from ucm.pd.legs.rewrite import (
    ANSWER_WANTED,
    guess_tokens,
    kind_of,
    long_prompts,
    may_be_told,
    may_have_words,
    parse_body,
    prefill_body,
    prefill_fields,
    why_not_prefill,
    with_params,
    without_words,
)
from ucm.pd.protocol import CHAT_BATCH, RESPONSES


@dataclass(frozen=True)
class ReadRequest:
    """`body` is for decode. `first` is for prefill; without it `why_not` says why there is none.
    It `is_all` if it has all of the prompts, and its receipt is about them. `chain` is that of its
    prompt, `marks` those of ids, and `prefix` says where it lies, where anybody wants to know.
    `wants_receipt`: decode is asked how much it stores where it is told nothing else."""

    body: bytes
    fields: dict[str, Any]
    tokens: int
    kind: str
    why_not: str | None
    first: bytes
    is_all: bool
    chain: tuple[Link, ...] = ()
    marks: tuple[Mark, ...] = ()
    prefix: Prefix | None = None
    wants_receipt: bool = False

    def known(self) -> ReadRequest:
        """The same request, of which nearly all is in the store: for decode alone."""
        body = with_params(self.body, ANSWER_WANTED) if self.wants_receipt else self.body
        return replace(self, why_not="known", body=body)


def read_request(
    body: bytes,
    path: str,
    *,
    min_tokens: int,
    has_prefill: bool,
    chains: bool = False,
    places_from: int | None = None,
) -> ReadRequest | None:
    """None if it is no JSON object. With `places_from` prompts with so many tokens, a guess, have a
    prefix."""
    fields = parse_body(body)
    if fields is None:
        return None
    body, fields = without_words(body, fields)
    why_not, first, is_all = None, b"", True
    chain: tuple[Link, ...] = ()
    marks: tuple[Mark, ...] = ()
    if has_prefill:
        why_not = why_not_prefill(fields, min_tokens=min_tokens)
        if why_not is None:
            long, is_all = long_prompts(fields, min_tokens=min_tokens)
            first = prefill_body(long, path=path)
            # vLLM answers with one receipt for one prompt.
            is_all = is_all and path != CHAT_BATCH
            if chains and is_all:
                of_leg = prefill_fields(long, path=path)
                chain = chain_of(of_leg, path=path)
                marks = marks_of(of_leg, chain)
    tokens, prefix = guess_tokens(fields), None
    if places_from is not None and tokens >= places_from:
        of_prompt = prefill_fields(fields, path=path)
        prefix = prefix_of(of_prompt, chain or chain_of(of_prompt, path=path))
    return ReadRequest(
        body,
        fields,
        tokens,
        kind_of(path, fields),
        why_not,
        first,
        is_all,
        chain,
        marks,
        prefix,
        # vLLM's streams have no place for a receipt, and without marks nobody has a use for it.
        wants_receipt=bool(marks) and not fields.get("stream") and may_be_told(fields),
    )


def answers_at_once(path: str, fields: Mapping[str, Any]) -> bool:
    """Whether decode's first byte says nothing of its having found or computed the prompt: it says
    of a response that there will be one before it has done anything for it."""
    return path == RESPONSES and bool(fields.get("stream") or fields.get("background"))


def is_invocation(wanted: ReadRequest | None) -> bool:
    """What vLLM takes for a chat or a completion where anything may be asked."""
    return wanted is not None and ("messages" in wanted.fields or "prompt" in wanted.fields)


def passed_on(body: bytes) -> bytes:
    """Of a request to any other route: as it is, but for words of a hand-off."""
    if may_have_words(body) and (fields := parse_body(body)) is not None:
        body, _ = without_words(body, fields)
    return body
