"""Who is there, as etcd keeps it: the records of instances, and a small client.

The client speaks the JSON gateway of etcd 3.4 and later, over plain HTTP: keys and values are
base64, 64 bit numbers are strings, and what is zero or empty is left out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import msgspec
from yarl import URL

from ucm.errors import ConfigError, UcmError
from ucm.pd.instance import Role

PREFIX = "/ucm/instances/"
CALL_TIMEOUT_S = 2.0
# Nothing of ours comes near it; something has to end a line that never ends.
MAX_LINE_BYTES = 64 << 20

_NOT_FOUND = 404
_Answer = TypeVar("_Answer", bound=msgspec.Struct)


class EtcdError(UcmError):
    """etcd can't be reached, refuses, or speaks nonsense. Says where, what was asked, and why."""


class Registration(msgspec.Struct, frozen=True):
    """One instance. Another `incarnation` at the same url is another instance."""

    role: str
    url: str
    incarnation: str

    @property
    def key(self) -> str:
        url = URL(self.url)
        host = f"[{url.raw_host}]" if ":" in (url.raw_host or "") else url.raw_host
        return f"{PREFIX}{self.role}/{host}:{url.port}"

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, value: bytes) -> Registration:
        """Raises ValueError for what is no record of an instance."""
        record = msgspec.json.decode(value, type=cls)
        Role(record.role)
        url = URL(record.url)
        if url.scheme not in ("http", "https") or not url.host or url != url.origin():
            raise ValueError(f"{record.url!r} is no http://host:port")
        return record


@dataclass(frozen=True)
class Event:
    """What became of a key. Deleted if `value` is None."""

    key: str
    value: bytes | None


@dataclass(frozen=True)
class Snapshot:
    """All keys under a prefix, as of a revision."""

    values: dict[str, bytes]
    revision: int


def etcd_url(address: str) -> URL:
    """`host:port` or `http://host:port`. Raises ConfigError."""
    try:
        url = URL(address if "://" in address else f"http://{address}")
        is_whole = url.scheme in ("http", "https") and url.host and url.explicit_port
        if is_whole and url == url.origin():
            return url
    except ValueError:
        pass
    raise ConfigError(f"{address!r} is no etcd: give it as host:port")


class Etcd:
    """A client of one etcd. Every call ends within `timeout_s`; all of them raise EtcdError.

    Owned by the event loop's thread. The session is the caller's, who closes it.
    """

    def __init__(
        self, session: aiohttp.ClientSession, address: str, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> None:
        """Raises ConfigError for an address that is no host:port."""
        self._session = session
        self._url = etcd_url(address)
        self._timeout_s = timeout_s

    async def range(self, prefix: str) -> Snapshot:
        """All keys that begin with `prefix`."""
        fields = {"key": prefix.encode(), "range_end": _end_of(prefix)}
        answer = await self._call("kv/range", fields, _Range)
        values = {_text(each.key): each.value for each in answer.kvs}
        return Snapshot(values, answer.header.revision)

    async def get(self, key: str) -> bytes | None:
        answer = await self._call("kv/range", {"key": key.encode()}, _Range)
        return answer.kvs[0].value if answer.kvs else None

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> None:
        """The key goes with its lease; without one (0) it stays."""
        fields = {"key": key.encode(), "value": value, "lease": str(lease)}
        await self._call("kv/put", fields, _Plain)

    async def delete(self, key: str) -> None:
        await self._call("kv/deleterange", {"key": key.encode()}, _Plain)

    async def grant(self, ttl_s: int) -> int:
        """A new lease. etcd may make it longer: it has a shortest one (2 s as it comes)."""
        answer = await self._call("lease/grant", {"TTL": str(ttl_s)}, _Lease)
        if not answer.id:
            raise EtcdError(f"{self._url}: lease/grant: the answer names no lease")
        return answer.id

    async def keep_alive(self, lease: int) -> bool:
        """Whether the lease was still there; if so, its time begins anew."""
        answer = await self._call("lease/keepalive", {"ID": str(lease)}, _KeptAlive)
        return answer.result.ttl_s > 0

    async def revoke(self, lease: int) -> None:
        """The lease's keys are gone with it. One that has run out already is fine."""
        await self._call("lease/revoke", {"ID": str(lease)}, _Plain, but=_NOT_FOUND)

    async def watch(
        self, prefix: str, *, revision: int, for_s: float
    ) -> AsyncGenerator[tuple[Event, ...], None]:
        """What becomes of the keys under `prefix` from `revision` on.

        Ends after `for_s`, whether etcd still lives or not: a peer that has vanished without a
        word looks like one that has no news, and only a call tells them apart. Raises EtcdError
        when etcd ends it earlier, as it does when `revision` is compacted away.
        """
        create = {
            "key": prefix.encode(),
            "range_end": _end_of(prefix),
            "start_revision": str(revision),
        }
        with self._translated("watch"):
            try:
                async with self._post("watch", {"create_request": create}, for_s) as response:
                    async for line in _lines(response):
                        if events := _events(line):
                            yield events
            except asyncio.TimeoutError:
                return
        raise EtcdError(f"{self._url}: watch: the answer ended")

    async def _call(
        self, path: str, fields: dict[str, Any], answer: type[_Answer], *, but: int = 0
    ) -> _Answer:
        """`but` is a status that is as good as 200, with nothing to read."""
        with self._translated(path):
            async with self._post(path, fields, self._timeout_s, but=but) as response:
                body = await response.read()
                is_empty = response.status == but
                return msgspec.json.decode(b"{}" if is_empty else body, type=answer, strict=False)

    @contextlib.asynccontextmanager
    async def _post(
        self, path: str, fields: dict[str, Any], timeout_s: float, *, but: int = 0
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        data = msgspec.json.encode(fields)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        url = self._url / "v3" / path
        async with self._session.post(url, data=data, timeout=timeout) as response:
            if response.status not in (200, but):
                raise _Refused(f"{response.status} {(await response.text())[:200]}")
            yield response

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except asyncio.TimeoutError as error:
            raise EtcdError(f"{self._url}: {what}: no answer in time") from error
        except (aiohttp.ClientError, OSError, ValueError, msgspec.MsgspecError) as error:
            raise EtcdError(f"{self._url}: {what}: {error}") from error


class _Refused(ValueError):
    pass


# -- what the gateway answers ------------------------------------------------------------------


class _Header(msgspec.Struct):
    revision: int = 0


class _KeyValue(msgspec.Struct):
    key: bytes = b""
    value: bytes = b""


class _Plain(msgspec.Struct):
    pass


class _Range(msgspec.Struct):
    header: _Header
    kvs: tuple[_KeyValue, ...] = ()


class _Lease(msgspec.Struct):
    id: int = msgspec.field(name="ID", default=0)
    ttl_s: int = msgspec.field(name="TTL", default=0)


class _KeptAlive(msgspec.Struct):
    result: _Lease


class _RawEvent(msgspec.Struct):
    kv: _KeyValue
    type: str = "PUT"


class _Changes(msgspec.Struct):
    canceled: bool = False
    cancel_reason: str = ""
    compact_revision: int = 0
    events: tuple[_RawEvent, ...] = ()


class _Line(msgspec.Struct):
    result: _Changes | None = None
    error: msgspec.Raw = msgspec.Raw()


def _events(line: bytes) -> tuple[Event, ...]:
    """Raises ValueError when the line says that the watch is over, or nothing that makes sense."""
    parsed = msgspec.json.decode(line, type=_Line, strict=False)
    changes = parsed.result
    if changes is None:
        raise _Refused(bytes(parsed.error)[:200].decode(errors="replace"))
    if changes.compact_revision:
        raise _Refused(f"compacted up to revision {changes.compact_revision}")
    if changes.canceled:
        raise _Refused(f"cancelled: {changes.cancel_reason}")
    return tuple(
        Event(_text(each.kv.key), None if each.type == "DELETE" else each.kv.value)
        for each in changes.events
    )


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """aiohttp's own lines end at 128 KiB, and many events at once are longer."""
    rest = b""
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            raise _Refused(f"a line of more than {MAX_LINE_BYTES} bytes")
        for line in filter(None, lines):
            yield line


def _end_of(prefix: str) -> bytes:
    """The first key after all that begin with `prefix`, which ends in an ASCII character."""
    raw = prefix.encode()
    return raw[:-1] + bytes([raw[-1] + 1])


def _text(key: bytes) -> str:
    """Of any key: somebody else's need not be UTF-8."""
    return key.decode(errors="backslashreplace")
