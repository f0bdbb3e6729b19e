"""Asks etcd: at the endpoint that answers, over TLS if it is to be, with a token of the user.

    call ──► endpoint ──► lost? ──► the next one ──► ... ──► EtcdError when all of them are lost
               │  ▲
               ▼  │ once, with a new token
           token refused

What is lost is an endpoint: it can't be reached, is silent, or is unwell (5xx). A refusal of etcd
is the same at each of its members and goes to the caller at once. Since a request may have been
done by an endpoint that was lost before it could answer, only what may be done twice is asked here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, TypeVar

import aiohttp
import msgspec
from yarl import URL

from ucm.errors import ConfigError
from ucm.pd.fleet.etcd_access import EtcdAccess
from ucm.pd.fleet.etcd_gateway import (
    MAX_ANSWER_BYTES,
    EtcdError,
    Event,
    Refusal,
    Token,
    TooLong,
    events,
    lines,
    refusal,
    whole,
)

logger = logging.getLogger(__name__)

# Between two lines that say that another endpoint is asked now.
_SAY_AGAIN_S = 60.0
_SHORTEST_S = 0.001
_AUTHENTICATE, _WATCH = "auth/authenticate", "watch"

_Answer = TypeVar("_Answer")
_LOST = (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError, msgspec.MsgspecError)


class EtcdRefused(EtcdError):
    """etcd's own no. Another token may help if it `is_about_token`; if not it stays a no."""

    def __init__(self, message: str, refused: Refusal, *, is_about_token: bool = False) -> None:
        super().__init__(message)
        self.refusal = refused
        self.is_about_token = is_about_token


class _Unwell(ValueError):
    """An endpoint answers that it can't."""


class EtcdLink:
    """Owned by the event loop's thread. The session is the caller's, who closes it."""

    def __init__(
        self, session: aiohttp.ClientSession, access: EtcdAccess, *, timeout_s: float
    ) -> None:
        self._session = session
        self._access = access
        self._timeout_s = timeout_s
        self._at = 0
        # How often an endpoint was lost. Others may have lost it, too, and a lease for it.
        self.num_lost = 0
        self._why_lost: EtcdError | None = None
        self._answered: URL | None = None
        self._quiet_until_s = 0.0
        # None: to be read from files. Read anew after a failure, in which they may have a part.
        self._tls: ssl.SSLContext | None = None
        # None: to be asked for. Empty: etcd wants none.
        self._token: str | None = None
        self._renews_for_watch = False
        self._said_auth_is_off = False

    async def call(self, path: str, fields: dict[str, Any], answer: type[_Answer]) -> _Answer:
        """Within the timeout at each endpoint. Raises EtcdError, for a refusal EtcdRefused."""
        problems: list[EtcdError] = []
        for _ in self._access.endpoints:
            url = self._access.endpoints[self._at]
            try:
                body = await self._renewing(url, path, fields)
                answered = msgspec.json.decode(body, type=answer, strict=False)
            except ConfigError as error:
                raise EtcdError(f"{url}: {path}: {error}") from error
            except _LOST as error:
                problems.append(self._lose(url, path, error))
            else:
                self._say_where(url)
                return answered
        raise EtcdError("; ".join(map(str, problems))) from problems[-1].__cause__

    async def watch(
        self, fields: dict[str, Any], *, for_s: float
    ) -> AsyncGenerator[tuple[Event, ...], None]:
        """Ends after `for_s`, or when it needs a new token, if that is not twice in a row.

        Raises EtcdError.
        """
        url = self._access.endpoints[self._at]
        try:
            async with aclosing(self._watched(url, fields, for_s)) as batches:
                async for batch in batches:
                    self._renews_for_watch = False
                    yield batch
        except asyncio.TimeoutError:
            self._renews_for_watch = False
        except (EtcdRefused, ConfigError, *_LOST) as error:
            if not self._renews_for_watch and self._may_renew(error):
                self._renews_for_watch = True
            elif isinstance(error, EtcdRefused):
                raise
            else:
                raise self._lose(url, _WATCH, error) from error

    # -- one endpoint ----------------------------------------------------------------------

    async def _renewing(self, url: URL, path: str, fields: dict[str, Any]) -> bytes:
        """All of it within the timeout."""
        ends_s = time.monotonic() + self._timeout_s
        try:
            return await self._read(url, path, fields, await self._valid_token(url, ends_s), ends_s)
        except (EtcdRefused, aiohttp.ServerDisconnectedError) as error:
            if not self._may_renew(error):
                raise
            return await self._read(url, path, fields, await self._valid_token(url, ends_s), ends_s)

    def _may_renew(self, error: Exception) -> bool:
        """Some versions of the gateway hang up instead of saying that a token is no good."""
        is_about_token = isinstance(error, aiohttp.ServerDisconnectedError) or (
            isinstance(error, EtcdRefused) and error.is_about_token
        )
        if self._access.user is None or not is_about_token:
            return False
        self._token = None
        return True

    async def _read(
        self, url: URL, path: str, fields: dict[str, Any], token: str, ends_s: float
    ) -> bytes:
        async with self._post(url, path, fields, token, ends_s) as response:
            return await whole(response)

    async def _watched(
        self, url: URL, fields: dict[str, Any], for_s: float
    ) -> AsyncGenerator[tuple[Event, ...], None]:
        """Never ends without an error."""
        ends_s = time.monotonic() + for_s
        token = await self._valid_token(url, ends_s)
        async with self._post(url, _WATCH, fields, token, ends_s) as response:
            async for line in lines(response):
                batch = events(line)
                if isinstance(batch, Refusal):
                    raise self._refused(url, _WATCH, batch)
                if batch:
                    yield batch
        raise _Unwell("the answer ended")

    @contextlib.asynccontextmanager
    async def _post(
        self, url: URL, path: str, fields: dict[str, Any], token: str, ends_s: float
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if url.scheme == "https" and self._tls is None:
            self._tls = await asyncio.to_thread(self._access.tls_context)
        async with self._session.post(
            url / "v3" / path,
            data=msgspec.json.encode(fields),
            headers={"Authorization": token} if token else {},
            # None of it left is not the 0 that would mean no limit.
            timeout=aiohttp.ClientTimeout(total=max(ends_s - time.monotonic(), _SHORTEST_S)),
            ssl=self._tls or True,
            # A token is for the endpoints that were named.
            allow_redirects=False,
        ) as response:
            if response.status != 200:
                raise self._refused(url, path, refusal(response.status, await whole(response)))
            yield response

    async def _valid_token(self, url: URL, ends_s: float) -> str:
        """Two who ask at the same time get one each, which does no harm."""
        if self._access.user is None:
            return ""
        if self._token is None:
            self._token = await self._authenticate(url, ends_s)
        return self._token

    async def _authenticate(self, url: URL, ends_s: float) -> str:
        password = await asyncio.to_thread(self._access.password)
        fields = {"name": self._access.user, "password": password}
        try:
            body = await self._read(url, _AUTHENTICATE, fields, "", ends_s)
        except EtcdRefused as error:
            if not error.refusal.is_auth_off:
                raise
            if not self._said_auth_is_off:
                logger.warning("%s: authentication is not enabled: anybody may register", url)
            self._said_auth_is_off = True
            return ""
        return msgspec.json.decode(body, type=Token).token

    # -- what went wrong -------------------------------------------------------------------

    def _refused(self, url: URL, path: str, refused: Refusal) -> Exception:
        at, text, user = f"{url}: {path}", refused.text, self._access.user
        if refused.is_of_endpoint:
            return _Unwell(text)
        if path == _AUTHENTICATE:
            return EtcdRefused(
                f"{url}: etcd refuses user {user}: {text}: look at --etcd-user and its password",
                refused,
            )
        if user is None and refused.is_about_token:
            return EtcdRefused(
                f"{at}: etcd wants a user: give --etcd-user and --etcd-password-file", refused
            )
        is_old = refused.is_about_token or (path == _WATCH and refused.is_denied)
        if refused.is_denied:
            return EtcdRefused(
                f"{at}: {text}: the role of user {user} lacks a right to the keys",
                refused,
                is_about_token=is_old,
            )
        return EtcdRefused(f"{at}: {text}", refused, is_about_token=is_old)

    def _lose(self, url: URL, path: str, error: Exception) -> EtcdError:
        """The next one is asked from now on. What there is to say about this one."""
        if self._access.endpoints[self._at] == url:
            self._at = (self._at + 1) % len(self._access.endpoints)
        self.num_lost += 1
        self._tls = None
        self._why_lost = _lost(f"{url}: {path}", error)
        self._why_lost.__cause__ = error
        return self._why_lost

    def _say_where(self, url: URL) -> None:
        is_other = url != (self._answered or self._access.endpoints[0])
        self._answered = url
        if is_other and time.monotonic() >= self._quiet_until_s:
            self._quiet_until_s = time.monotonic() + _SAY_AGAIN_S
            logger.warning("another etcd, %s, is asked from now on: %s", url, self._why_lost)


def _lost(at: str, error: Exception) -> EtcdError:
    """In words that somebody can act on."""
    text = str(error) or type(error).__name__
    if isinstance(error, asyncio.TimeoutError):
        return EtcdError(f"{at}: no answer in time")
    if isinstance(error, TooLong):
        return EtcdError(
            f"{at}: its answer has more than {MAX_ANSWER_BYTES >> 20} MiB: look whether an etcd"
            " listens there"
        )
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return EtcdError(
            f"{at}: it hangs up, as one may that wants TLS (https://) or a user (--etcd-user)"
        )
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        reason = getattr(error.certificate_error, "verify_message", "") or text
        return EtcdError(f"{at}: its certificate is not trusted: {reason}: look at --etcd-ca-file")
    is_reset = isinstance(getattr(error, "os_error", None), ConnectionResetError)
    if is_reset or "WRONG_VERSION_NUMBER" in text or "RECORD_LAYER_FAILURE" in text:
        return EtcdError(f"{at}: it speaks no TLS: write http://, without files of certificates")
    if "ALERT" in text and "SSL" in text:
        return EtcdError(
            f"{at}: it refuses our certificate, or wants one: look at --etcd-cert-file: {text}"
        )
    return EtcdError(f"{at}: {text}")
