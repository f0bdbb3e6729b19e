"""A prompt as a chain of parts: messages, or stretches of text or of token ids. Pure.

Each digest in it names all that stands before its end, with every field of the request that may
shape the prompt. It is made of the one before and the part between, so that a chain goes on where
more parts are behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xxhash import xxh3_128_digest

from ucm.pd.fleet.affinity import Prefix
from ucm.pd.legs import bodies
from ucm.pd.legs.rewrite import guess
from ucm.pd.legs.shaping import shaping

# The one of them that a request has is its prompt, but for what stands before it.
_PROMPTS = ("messages", "input", "token_ids", "prompt")
_TEXT_PART_CHARS = 1024
IDS_PART = 256
# Texts and ids that open alike are told from each other in such steps, and so many of them.
_STEPS_OF_A_PART = 8
_MAX_STEPS = 64


@dataclass(frozen=True)
class Link:
    """The beginning of a prompt up to the end of one of its parts. `rest_tokens` is a guess at what
    is behind it, and `answer_tokens` of that at what was answered to it."""

    digest: bytes
    rest_tokens: int
    answer_tokens: int = 0


@dataclass(frozen=True)
class Mark:
    """The beginning of a prompt of ids up to the end of a whole part: its digest, how many ids that
    has, and the part behind it."""

    digest: bytes
    num_ids: int
    next_ids: Sequence[int]


def linked(digest: bytes, part: object) -> bytes:
    """The next digest of a chain."""
    return xxh3_128_digest(digest + bodies.encode(part))


def chain_of(first: Mapping[str, Any], *, path: str) -> tuple[Link, ...]:
    """Of the fields of a prefill leg, longest first. Empty for several prompts in one request, and
    for none. Pure."""
    name = next((name for name in _PROMPTS if first.get(name) is not None), "")
    parts = list(_parts(first.get(name)))
    # Inside of them order may count: tools end up in the prompt as they are written.
    around = bodies.encode(shaping(first, but=name))
    digest = xxh3_128_digest(path.encode(errors="surrogateescape") + b"\0" + around)
    digests, tokens = [], []
    answers = [_is_answer(part) for part in parts]
    for part in parts:
        digest = linked(digest, part)
        digests.append(digest)
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
    ends = range(IDS_PART, len(ids) + 1, IDS_PART)
    # The last link may be that of a part that is not whole.
    links = reversed(chain)
    marks = [
        Mark(link.digest, end, ids[end : end + IDS_PART])
        for link, end in zip(links, ends, strict=False)
    ]
    return tuple(reversed(marks))


def num_ids(marks: Sequence[Mark]) -> int:
    """Of the whole prompt."""
    return marks[0].num_ids + len(marks[0].next_ids)


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
    prompt = next(first[name] for name in _PROMPTS if first.get(name) is not None)
    if isinstance(prompt, list) and isinstance(prompt[0], dict):
        return Prefix(digests, digests[-1], digests[: -_MAX_STEPS - 1 : -1])
    part = _TEXT_PART_CHARS if isinstance(prompt, str) else IDS_PART
    step = part // _STEPS_OF_A_PART
    trail = [digests[-1]]
    for start in range(part, min(len(prompt), part + _MAX_STEPS * step), step):
        trail.append(linked(trail[-1], prompt[start : start + step]))
    return Prefix(digests, digests[-1], trail, _STEPS_OF_A_PART)


def _is_answer(part: object) -> bool:
    return isinstance(part, dict) and part.get("role") == "assistant"


def _parts(prompt: object) -> Iterator[Any]:
    if isinstance(prompt, str):
        step = _TEXT_PART_CHARS
        yield from (prompt[i : i + step] for i in range(0, len(prompt), step))
    elif isinstance(prompt, list) and all(type(each) is int for each in prompt):
        yield from (prompt[i : i + IDS_PART] for i in range(0, len(prompt), IDS_PART))
    elif isinstance(prompt, list) and all(isinstance(each, dict) for each in prompt):
        yield from prompt
