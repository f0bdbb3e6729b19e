"""Who is there, as etcd keeps it: the records of instances, and the few things that are asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

import aiohttp
import msgspec
from yarl import URL

from ucm.pd.fleet.etcd_access import EtcdAccess
from ucm.pd.fleet.etcd_gateway import Event, KeptAlive, Lease, Plain, Range, end_of, text_of
from ucm.pd.fleet.etcd_link import EtcdLink, EtcdRefused
from ucm.pd.fleet.instance import Role

PREFIX = "/ucm/instances/"
CALL_TIMEOUT_S = 2.0

_NOT_FOUND = 404


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
class Snapshot:
    """All keys under a prefix, as of a revision."""

    values: dict[str, bytes]
    revision: int


class Etcd:
    """A client of one etcd, whose members are its endpoints. All calls raise EtcdError.

    Every call ends within `timeout_s` for each endpoint. Owned by the event loop's thread. The
    session is the caller's, who closes it.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        access: EtcdAccess,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        self._link = EtcdLink(session, access, timeout_s=timeout_s)

    @property
    def num_lost(self) -> int:
        """How often an endpoint was lost, whether another one was there or not."""
        return self._link.num_lost

    async def range(self, prefix: str) -> Snapshot:
        """All keys that begin with `prefix`."""
        fields = {"key": prefix.encode(), "range_end": end_of(prefix)}
        answer = await self._link.call("kv/range", fields, Range)
        values = {text_of(each.key): each.value for each in answer.kvs}
        return Snapshot(values, answer.header.revision)

    async def get(self, key: str) -> bytes | None:
        answer = await self._link.call("kv/range", {"key": key.encode()}, Range)
        return answer.kvs[0].value if answer.kvs else None

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> None:
        """The key goes with its lease; without one (0) it stays."""
        fields = {"key": key.encode(), "value": value, "lease": str(lease)}
        await self._link.call("kv/put", fields, Plain)

    async def grant(self, ttl_s: int) -> int:
        """A new lease. etcd may make it longer: it has a shortest one (2 s as it comes)."""
        return (await self._link.call("lease/grant", {"TTL": str(ttl_s)}, Lease)).id

    async def keep_alive(self, lease: int) -> bool:
        """Whether the lease was still there; if so, its time begins anew."""
        answer = await self._link.call("lease/keepalive", {"ID": str(lease)}, KeptAlive)
        return answer.result.ttl_s > 0

    async def revoke(self, lease: int) -> None:
        """The lease's keys are gone with it. One that has run out already is fine."""
        try:
            await self._link.call("lease/revoke", {"ID": str(lease)}, Plain)
        except EtcdRefused as error:
            if error.refusal.status != _NOT_FOUND:
                raise

    def watch(
        self, prefix: str, *, revision: int, for_s: float
    ) -> AsyncGenerator[tuple[Event, ...], None]:
        """What becomes of the keys under `prefix` from `revision` on.

        Ends after `for_s` or a little sooner, whether etcd still lives or not: a peer that has
        vanished without a word looks like one that has no news, and only a call tells them apart.
        Raises EtcdError when etcd ends it, as it does when `revision` is compacted away.
        """
        create = {
            "key": prefix.encode(),
            "range_end": end_of(prefix),
            "start_revision": str(revision),
        }
        return self._link.watch({"create_request": create}, for_s=for_s)
