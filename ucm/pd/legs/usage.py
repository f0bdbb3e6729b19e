"""What clients are told of cached tokens: what prefill has found, not what it has left for decode.

Decode finds nearly the whole prompt in the store, because prefill has just put it there. So its
usage would say of a prompt that nobody has sent before that it was cached. What was cached when the
request came only prefill knows, and says in its own answer, in the form of the same protocol.

Only these numbers are replaced, and only where they differ; every other byte of an answer is
decode's. Where prefill does not say what it has found, decode's numbers stay. Pure but for
`PrefillUsage`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from ucm.pd.legs import bodies

_NAMES = (b'"cached_tokens"', b'"cache_read_input_tokens"')
# Of tokens that were found and, where engines say so, of those that were put there: in OpenAI's
# chats and completions, in its responses, and in Anthropic's messages.
_DETAILS = {
    "prompt_tokens_details": ("cached_tokens", "created_cache_tokens"),
    "input_tokens_details": ("cached_tokens", "cache_write_tokens"),
}
_READ, _CREATED = "cache_read_input_tokens", "cache_creation_input_tokens"
_PER_TURN = "cached_tokens_per_turn"


@dataclass(frozen=True)
class FoundCached:
    """In its caches, by the instance that was first asked for the prompt. `created` are the tokens
    that it has put there; None if it does not say."""

    cached: int
    created: int | None


class _Inner(msgspec.Struct):
    usage: msgspec.Raw = msgspec.Raw()


class _Outer(msgspec.Struct):
    usage: msgspec.Raw = msgspec.Raw()
    # Of an event about a response.
    response: msgspec.Raw = msgspec.Raw()


_outer, _inner = msgspec.json.Decoder(_Outer), msgspec.json.Decoder(_Inner)


def found_in(answer: bytes) -> FoundCached | None:
    """Of a prefill's whole answer."""
    usage = _usage(answer)
    if usage is None:
        return None
    numbers: dict[str, Any] = usage[1]
    names = (_READ, _CREATED)
    for details, names_of_details in _DETAILS.items():
        if isinstance(numbers.get(details), dict):
            numbers, names = numbers[details], names_of_details
            break
    cached, created = (_count(numbers.get(name)) for name in names)
    return None if cached is None else FoundCached(cached, created)


def may_have_cached(data: bytes) -> bool:
    """Cheap: whether there is something to correct, in a whole body or in events."""
    return any(name in data for name in _NAMES)


def corrected_body(body: bytes, found: FoundCached) -> bytes:
    usage = _usage(body)
    if usage is None:
        return body
    raw, numbers = usage
    changed = corrected(numbers, found)
    # Nothing else in it can look like this: in a text quotes are escaped.
    return body if changed == numbers else body.replace(raw, bodies.encode(changed))


def corrected_events(events: bytes, found: FoundCached) -> bytes:
    """Of whole events, with their ends."""
    return b"".join(
        corrected_body(line, found) if may_have_cached(line) else line
        for line in events.splitlines(keepends=True)
    )


def corrected(usage: dict[str, Any], found: FoundCached) -> dict[str, Any]:
    """A usage object with these numbers in place of decode's. One without any stays so."""
    for details, (cached, created) in _DETAILS.items():
        given = usage.get(details)
        if isinstance(given, dict) and _count(given.get(cached)) is not None:
            prompt = _count(usage.get("prompt_tokens", usage.get("input_tokens")))
            if prompt is not None:
                found = FoundCached(min(found.cached, prompt), found.created)
            return {**usage, details: _in_details(given, found, cached, created)}
    read = _count(usage.get(_READ))
    if read is None:
        return usage
    # Anthropic's input_tokens are those that are in neither of the other two.
    created_before = _count(usage.get(_CREATED))
    prompt = (_count(usage.get("input_tokens")) or 0) + read + (created_before or 0)
    cached_now = min(found.cached, prompt)
    changed = {**usage, _READ: cached_now}
    created_now = 0
    if created_before is not None:
        created_now = created_before if found.created is None else found.created
        created_now = changed[_CREATED] = min(created_now, prompt - cached_now)
    changed["input_tokens"] = prompt - cached_now - created_now
    return changed


def _in_details(
    given: dict[str, Any], found: FoundCached, cached: str, created: str
) -> dict[str, Any]:
    changed = dict(given)
    turns = given.get(_PER_TURN)
    if isinstance(turns, list) and turns and all(_count(each) is not None for each in turns):
        # The prompt is the first turn's; what later ones find cached, this very request has made.
        changed[_PER_TURN] = [found.cached, *turns[1:]]
        changed[cached] = max(0, given[cached] - turns[0]) + found.cached
    else:
        changed[cached] = found.cached
    if found.created is not None and _count(given.get(created)) is not None:
        changed[created] = found.created
    return changed


def _usage(data: bytes) -> tuple[bytes, dict[str, Any]] | None:
    """As it stands there, and read. `data` is a body, or a line of an event."""
    start = data.find(b"{")
    if start < 0 or (start > 0 and not data.startswith(b"data:")):
        return None
    try:
        outer = _outer.decode(data[start:].rstrip())
        raw = bytes(outer.usage)
        if not raw and bytes(outer.response).startswith(b"{"):
            raw = bytes(_inner.decode(outer.response).usage)
        usage = bodies.decode(raw) if raw else None
    except (ValueError, RecursionError):
        return None
    return (raw, usage) if isinstance(usage, dict) else None


def _count(value: object) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if is_count else None  # type: ignore[return-value]


# What a request's prefill has found, once it has said so; None if it doesn't, or not soon.
Asking = Callable[[], Awaitable[FoundCached | None]]


class PrefillUsage:
    """For one answer."""

    def __init__(self, found: Asking) -> None:
        self._found = found

    async def in_body(self, body: bytes) -> bytes:
        return await self._corrected(body, corrected_body)

    async def in_events(self, events: bytes) -> bytes:
        return await self._corrected(events, corrected_events)

    async def _corrected(
        self, data: bytes, correct: Callable[[bytes, FoundCached], bytes]
    ) -> bytes:
        if not may_have_cached(data):
            return data
        found = await self._found()
        if found is None:
            return data
        return await bodies.apart(partial(correct, data, found), num_bytes=len(data))
