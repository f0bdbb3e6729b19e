"""What goes to an engine and what comes back: headers, and the ways in which it can fail."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from io import BytesIO
from types import SimpleNamespace

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from ucm.pd.access import Access
from ucm.pd.fleet.instance import Role
from ucm.pd.security.tls import Followed

# vLLM's server closes idle connections after 5 s: let go before it does, or a request now and then
# goes out on a connection that is just being closed.
IDLE_CONNECTION_S = 3.0
REQUEST_ID = "X-Request-Id"
# Of one line or one field, both ways: vLLM takes about 60 kB.
MAX_HEADER_BYTES = 128 << 10

# About one connection, not about the message (RFC 9110, 7.6.1).
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# Said anew for each connection.
_REQUEST_ONLY = frozenset({"host", "content-length", "expect"})
# They say where something is.
_POINTERS = ("Location", "Content-Location")
# As browsers read it, who take backslashes for slashes and need none behind `http:`.
_SCHEME_AND_HOST = re.compile(
    r"\s*(?:https?:[/\\]*|(?:[a-z][a-z0-9+.-]*:)?[/\\]{2,})[^/\\?#]*", re.IGNORECASE
)
# aiohttp unpacks such bodies as it reads them.
_UNPACKED = frozenset({"gzip", "deflate", "br"})
_NO_DEFAULTS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")

_RESET = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError)
# The engine can't be reached, or has gone, or is silent: another one may do.
UNREACHABLE = (aiohttp.ClientError, OSError, asyncio.TimeoutError)
# The proxy has no descriptor, buffer or port left: that says nothing about any instance, and it
# would have none for another one either.
OUT_OF_SOCKETS = "out_of_sockets"
_OUT_OF_SOCKETS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EADDRNOTAVAIL)


@dataclass(frozen=True)
class Client:
    """Connections to the engines. `pooled` keeps them for what comes next; `fresh` makes one for
    each request."""

    pooled: aiohttp.ClientSession
    fresh: aiohttp.ClientSession
    connect_timeout_s: float
    access: Access
    tls: Followed[ssl.SSLContext | bool]

    def headers(
        self, given: CIMultiDictProxy[str], role: Role, *, request_id: str
    ) -> CIMultiDict[str]:
        """A client's headers for an engine, under this request id, with the key of its side."""
        sent = request_headers(given, request_id=request_id)
        self.access.authorize(sent, role)
        return sent


@contextlib.asynccontextmanager
async def client(
    *, connect_timeout_s: float, access: Access, tls: Followed[ssl.SSLContext | bool]
) -> AsyncIterator[Client]:
    """No limit and no total timeout: a decode may stream for an hour, and thousands at once."""
    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(_note_reuse)
    pooled = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S)
    fresh = aiohttp.TCPConnector(limit=0, force_close=True)
    async with _session(pooled, trace) as one, _session(fresh) as other:
        yield Client(one, other, connect_timeout_s, access, tls)


def _session(
    connector: aiohttp.TCPConnector, *traces: aiohttp.TraceConfig
) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=_NO_DEFAULTS,
        trace_configs=list(traces),
    )


@dataclass
class _Sending:
    """`is_reused`: it went out on a connection that was kept from before."""

    is_reused: bool = False


async def _note_reuse(
    session: aiohttp.ClientSession, context: SimpleNamespace, params: object
) -> None:
    del session, params
    if isinstance(context.trace_request_ctx, _Sending):
        context.trace_request_ctx.is_reused = True


def target(instance: URL, raw_path: str) -> URL:
    """Where a client's request goes at an instance: its path and query as they came, and never
    another host, whatever the request line names."""
    if not raw_path.startswith("/"):
        raw_path = URL(raw_path, encoded=True).raw_path_qs if "://" in raw_path else "/"
    return URL(f"{instance.origin()}{raw_path}", encoded=True)


async def ask(
    client: Client,
    method: str,
    url: URL,
    *,
    body: bytes | None,
    headers: CIMultiDict[str],
    idle_timeout_s: float | None,
) -> aiohttp.ClientResponse:
    """The answer once its headers are there; the caller releases it. Raises UNREACHABLE.

    A server may close a connection that is kept at the moment in which a request goes out on it.
    That is nobody's failure: the request is sent once more on a new one.
    """
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=client.connect_timeout_s, sock_read=idle_timeout_s
    )

    async def send(session: aiohttp.ClientSession, sending: _Sending) -> aiohttp.ClientResponse:
        # A file object is sent in pieces; many MiB at once would hold up every other stream.
        return await session.request(
            method,
            url,
            data=None if body is None else BytesIO(body),
            headers=headers,
            allow_redirects=False,
            timeout=timeout,
            trace_request_ctx=sending,
            ssl=client.tls.now,
        )

    sending = _Sending()
    try:
        return await send(client.pooled, sending)
    except _RESET as error:
        if not sending.is_reused or failure_reason(error) != "broken_off":
            raise
    return await send(client.fresh, sending)


async def read_whole(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The body. Raises UNREACHABLE, also for one that is longer than that: it is `unreadable`."""
    body = await read_at_most(response, max_bytes + 1)
    if len(body) > max_bytes:
        response.close()
        raise aiohttp.ClientResponseError(
            response.request_info,
            response.history,
            status=response.status,
            message=f"an answer above {max_bytes >> 20} MiB",
        )
    return body


async def read_at_most(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The beginning of the body, or all of it. Raises UNREACHABLE."""
    body = bytearray()
    while len(body) < max_bytes:
        piece = await response.content.read(max_bytes - len(body))
        if not piece:
            break
        body += piece
    return bytes(body)


def request_headers(headers: CIMultiDictProxy[str], *, request_id: str) -> CIMultiDict[str]:
    """The client's without what is about its connection, and under this request id. Pure."""
    sent = _end_to_end(headers, but=_REQUEST_ONLY)
    if sent.get("Content-Encoding", "").lower() in _UNPACKED:
        del sent["Content-Encoding"]
    sent[REQUEST_ID] = request_id
    return sent


def response_headers(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """The engine's, for the client, who finds what they point to at the proxy."""
    sent = _end_to_end(headers, but=frozenset())
    for name in _POINTERS:
        if name in sent:
            sent[name] = at_the_proxy(sent[name])
    return sent


def at_the_proxy(location: str) -> str:
    """A reference of an engine's, without the host that it names. Pure.

    An engine makes it of the address at which it is asked, or of a name of its own that the proxy
    never heard of. Whatever it is, it is one behind the proxy.
    """
    location = location.replace("\t", "")  # browsers read on as if there were none
    host = _SCHEME_AND_HOST.match(location)
    if host is None:
        return location
    # With two slashes in front, what follows would be a host again.
    return "/" + location[host.end() :].lstrip("/\\")


def failure_reason(error: BaseException) -> str:
    """What counters call it."""
    if isinstance(error, OSError) and error.errno in _OUT_OF_SOCKETS:
        return "out_of_sockets"
    if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
        return "refused"
    if isinstance(error, asyncio.TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientResponseError):
        return "unreadable"
    return "broken_off"


def status_for(reason: str) -> int:
    """What a client hears who gets no other answer."""
    return {"timeout": 504, OUT_OF_SOCKETS: 503}.get(reason, 502)


def _end_to_end(headers: CIMultiDictProxy[str], *, but: frozenset[str]) -> CIMultiDict[str]:
    named = {name.strip().lower() for name in headers.get("Connection", "").split(",")}
    left_out = _HOP_BY_HOP | but | named
    return CIMultiDict((k, v) for k, v in headers.items() if k.lower() not in left_out)
