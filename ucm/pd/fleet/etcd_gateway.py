"""The words of etcd's JSON gateway (3.4 and later), and what its refusals mean. Pure.

Keys and values are base64, 64 bit numbers are strings, and what is zero or empty is left out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
import msgspec

from ucm.errors import UcmError

# Of an answer, or of one line of a watch. An instance takes less than 512 bytes of it; something
# has to end one that never ends, such as that of an address which is no etcd's.
MAX_ANSWER_BYTES = 16 << 20

# How etcd says that a token has expired, is unknown since a restart, is missing, or is older than
# a change of users and roles. The last has other words when the gateway passes it on as it is.
_ABOUT_TOKENS = (
    "invalid auth token",
    "user name is empty",
    "revision in header is old",
    "revision of auth store is old",
)
_NOT_ENABLED = "authentication is not enabled"
_DENIED = "permission denied"


class EtcdError(UcmError):
    """etcd can't be reached, refuses, or speaks nonsense. Says where, what was asked, and why."""


class TooLong(ValueError):
    """An answer, or a line of a watch, of more than MAX_ANSWER_BYTES. It is not read on."""


@dataclass(frozen=True)
class Event:
    """What became of a key. Deleted if `value` is None."""

    key: str
    value: bytes | None


@dataclass(frozen=True)
class Refusal:
    """An answer that is none. `text` is etcd's own words."""

    status: int
    text: str

    @property
    def is_about_token(self) -> bool:
        """Another token may help."""
        return any(words in self.text for words in _ABOUT_TOKENS)

    @property
    def is_denied(self) -> bool:
        """A watch with an expired token is refused so, too, as if the user had no right to it."""
        return _DENIED in self.text

    @property
    def is_auth_off(self) -> bool:
        return _NOT_ENABLED in self.text

    @property
    def is_of_endpoint(self) -> bool:
        """Another endpoint may do better: this one has no leader, is stopping, or is no etcd."""
        return self.status >= 500 and not self.is_about_token


def refusal(status: int, body: bytes) -> Refusal:
    try:
        text = msgspec.json.decode(body, type=_Error).error
    except msgspec.MsgspecError:
        text = ""
    return Refusal(status, text or f"{status} {body[:200].decode(errors='replace').strip()}")


# -- answers -----------------------------------------------------------------------------------


class _Error(msgspec.Struct):
    error: str = ""


class GatewayHeader(msgspec.Struct):
    revision: int = 0


class KeyValue(msgspec.Struct):
    key: bytes = b""
    value: bytes = b""


class Plain(msgspec.Struct):
    pass


class Token(msgspec.Struct):
    token: str


class Range(msgspec.Struct):
    header: GatewayHeader
    kvs: tuple[KeyValue, ...] = ()


class Lease(msgspec.Struct):
    id: int = msgspec.field(name="ID")
    ttl_s: int = msgspec.field(name="TTL", default=0)


class KeptAlive(msgspec.Struct):
    result: Lease


class _RawEvent(msgspec.Struct):
    kv: KeyValue
    type: str = "PUT"


class _Changes(msgspec.Struct):
    canceled: bool = False
    cancel_reason: str = ""
    compact_revision: int = 0
    events: tuple[_RawEvent, ...] = ()


class _Line(msgspec.Struct):
    result: _Changes | None = None
    error: msgspec.Raw = msgspec.Raw()


def events(line: bytes) -> tuple[Event, ...] | Refusal:
    """What a line of a watch says, or why the watch is over. Raises MsgspecError for nonsense."""
    parsed = msgspec.json.decode(line, type=_Line, strict=False)
    changes = parsed.result
    if changes is None:
        return Refusal(0, bytes(parsed.error)[:200].decode(errors="replace"))
    if changes.compact_revision:
        return Refusal(0, f"compacted up to revision {changes.compact_revision}")
    if changes.canceled:
        return Refusal(0, f"cancelled: {changes.cancel_reason}")
    return tuple(
        Event(text_of(each.kv.key), None if each.type == "DELETE" else each.kv.value)
        for each in changes.events
    )


async def whole(response: aiohttp.ClientResponse) -> bytes:
    """The body. Raises TooLong."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_ANSWER_BYTES:
            raise TooLong
    return bytes(body)


async def lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """aiohttp's own lines end at 128 KiB, and many events at once are longer. Raises TooLong."""
    rest = bytearray()
    async for chunk in response.content.iter_any():
        *ended, begun = chunk.split(b"\n")
        for line in ended:
            rest += line
            if rest:
                yield bytes(rest)
            rest.clear()
        rest += begun
        if len(rest) > MAX_ANSWER_BYTES:
            raise TooLong


def end_of(prefix: str) -> bytes:
    """The first key after all that begin with `prefix`, which ends in an ASCII character."""
    raw = prefix.encode()
    return raw[:-1] + bytes([raw[-1] + 1])


def text_of(key: bytes) -> str:
    """Of any key: somebody else's need not be UTF-8."""
    return key.decode(errors="backslashreplace")
