"""JSON as clients and engines write it: read, and written anew. Pure.

What is written is UTF-8, and no longer than what was read: a character outside of ASCII is not
escaped. Whatever can be read can be written, and says the same then. msgspec does the work; what it
refuses and vLLM takes, such as NaN and lone surrogates, Python's own reader does.

Reading or writing many MiB takes a while: `apart` keeps that out of the event loop's way, but for
single calls of msgspec, which no other thread interrupts: about 1 ms for a MiB of text or images, 3
for one of token ids.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

# Smaller ones take less time than to change threads is worth.
APART_BYTES = 1 << 20

_Result = TypeVar("_Result")


def decode(body: bytes) -> Any:
    """Raises ValueError for what is no JSON."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError):
        pass
    try:
        return json.loads(body, parse_constant=_verbatim, parse_float=_float)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def encode(value: object) -> bytes:
    """Of what `decode` has returned, changed or not."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        # A lone surrogate has no UTF-8: everything is escaped.
        return json.dumps(value, separators=(",", ":"), default=_number).encode()


async def apart(work: Callable[[], _Result], *, num_bytes: int) -> _Result:
    """The result of `work`, which is about so many bytes: of many, from another thread."""
    return await asyncio.to_thread(work) if num_bytes >= APART_BYTES else work()


def _verbatim(number: str) -> msgspec.Raw:
    """msgspec would write null for what is no finite number."""
    return msgspec.Raw(number.encode())


def _float(number: str) -> float | msgspec.Raw:
    value = float(number)
    return value if math.isfinite(value) else _verbatim(number)


def _number(raw: msgspec.Raw) -> float:
    return float(bytes(raw))
