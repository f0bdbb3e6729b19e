"""One bucket: the only file that calls the S3 client, and the narrow door to its network.

Every call has a deadline, is tried again once at most (by the client), goes through the breaker,
and raises TierError for whatever the server or the way to it does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.store import S3Store

from ucm.config.s3_environment import bad_credential, client_variables
from ucm.errors import ConfigError, TierError
from ucm.outcome import Outcome
from ucm.store.tiers.s3.breaker import BucketBreaker
from ucm.store.tiers.s3.credentials_file import CredentialsFile
from ucm.store.tiers.s3.s3_errors import (
    CLIENT_ERRORS,
    is_absent,
    is_denied,
    is_empty_object,
    is_of_client,
    tier_error_of,
    trouble_of,
)

if TYPE_CHECKING:
    from obstore.store import ClientConfig

_T = TypeVar("_T")

_CONNECT_S = 2.0
_MAX_RETRIES = 1


@dataclass(frozen=True)
class BucketPlace:
    """`timeout_s` is the whole time of a call, with the one that is tried again."""

    bucket: str
    region: str
    endpoint: str | None = None
    path_style: bool = True
    tls_ca_file: str | None = None
    credentials_file: str | None = None
    timeout_s: float = 10.0

    @property
    def url(self) -> str:
        """Always told to the client, which would else take one from the environment."""
        url = self.endpoint or f"https://s3.{self.region}.amazonaws.com"
        if self.path_style:
            return url
        parts = urlsplit(url)
        return f"{parts.scheme}://{self.bucket}.{parts.netloc}"


@dataclass(frozen=True)
class Got:
    """`content` are the bytes that were asked for, of an object of `size_bytes`; none of one that
    is longer than it may be."""

    content: memoryview
    size_bytes: int
    tag: str | None


class Bucket:
    """Thread-safe. No I/O before the first call, but for the file with the CA's certificate."""

    def __init__(self, place: BucketPlace, breaker: BucketBreaker) -> None:
        """Raises ConfigError."""
        self._place = place
        self._breaker = breaker
        self._certificate = _read_certificate(place.tls_ca_file)
        file = place.credentials_file
        self._credentials = CredentialsFile(file) if file is not None else None
        self._lock = threading.Lock()
        self._client: S3Store | None = None

    def put(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """One request: the object is there as a whole, or not at all. It is sent from where the
        parts lie, which the client lets go of when this returns or raises."""

        def put(client: S3Store) -> None:
            # As one buffer they would be copied once more.
            obstore.put(client, name, parts, use_multipart=False)

        self._call(name, "can't be written", put)

    def put_if_allowed(self, name: str, content: bytes) -> bool:
        """False where this user may only read."""

        def put(client: S3Store) -> bool:
            try:
                obstore.put(client, name, content, use_multipart=False)
            except CLIENT_ERRORS as error:
                if not is_denied(error):
                    raise
                return False
            return True

        return self._call(name, "can't be written", put)

    def get(self, name: str, *, most_bytes: int) -> Got | None:
        """The whole object; None: there is none. What others have put there may be of any size, and
        is not taken into memory."""

        def get(client: S3Store) -> Got:
            result = obstore.get(client, name)
            size_bytes = result.meta["size"]
            content = result.bytes() if size_bytes <= most_bytes else b""
            return Got(memoryview(content), size_bytes, result.meta["e_tag"])

        return self._unless_absent(name, "can't be read", get)

    def get_head(self, name: str, num_bytes: int) -> Got | None:
        """Its beginning, and how long all of it is; None: there is none."""

        def get(client: S3Store) -> Got:
            try:
                result = obstore.get(client, name, options={"range": (0, num_bytes)})
            except CLIENT_ERRORS as error:
                if not is_empty_object(error):
                    raise
                return Got(memoryview(b""), 0, None)
            return Got(memoryview(result.bytes()), result.meta["size"], result.meta["e_tag"])

        return self._unless_absent(name, "can't be read", get)

    def tag(self, name: str) -> str | None:
        """What tells this content of an object from others; None: there is no object."""
        return self._unless_absent(
            name, "can't be looked up", lambda client: obstore.head(client, name)["e_tag"] or ""
        )

    def move(self, name: str, to: str) -> None:
        def move(client: S3Store) -> None:
            obstore.copy(client, name, to)
            obstore.delete(client, name)

        self._call(name, "can't be moved aside", move)

    def _unless_absent(self, name: str, doing: str, call: Callable[[S3Store], _T]) -> _T | None:
        def ask(client: S3Store) -> _T | None:
            try:
                return call(client)
            except CLIENT_ERRORS as error:
                if not is_absent(error):
                    raise
                return None

        return self._call(name, doing, ask)

    def _call(self, name: str, doing: str, call: Callable[[S3Store], _T]) -> _T:
        what = f"s3://{self._place.bucket}/{name} at {self._place.url}"
        try:
            client = self._made()
            self._breaker.let_through()
        except TierError as error:
            raise TierError(f"{what}: {doing}: {error}", reason=error.reason) from None
        try:
            result = call(client)
        except BaseException as error:
            if not is_of_client(error):
                raise
            trouble = trouble_of(error)
            if trouble.is_unreachable:
                self._breaker.failed(trouble.why)
            else:
                self._breaker.worked()
                if self._credentials is not None and self._credentials.has_changed():
                    # The client would keep the old ones for a while.
                    self._client = None
            # Without what the client says, which may show more than people should see in a log.
            raise tier_error_of(what, doing, trouble) from None
        self._breaker.worked()
        return result

    def _made(self) -> S3Store:
        client = self._client
        if client is None:
            with self._lock:
                client = self._client = self._client or self._make()
        return client

    def _make(self) -> S3Store:
        """Raises TierError."""
        place = self._place
        if self._credentials is None and (name := bad_credential()):
            why = f"{name} has characters that no credential has, such as a line's end"
            raise TierError(why, reason=Outcome.IO_ERROR)
        # Two tries and the pause between them fit into the time of a call. Where the first has
        # taken all of its own there is no second.
        each = timedelta(seconds=0.45 * place.timeout_s)
        options: ClientConfig = {
            "allow_http": place.url.startswith("http://"),
            "timeout": each,
            "connect_timeout": min(timedelta(seconds=_CONNECT_S), each / 2),
        }
        if self._certificate is not None:
            options["root_certificate"] = self._certificate
        try:
            return S3Store(
                place.bucket,
                # The one that no variable comes before.
                aws_endpoint_url_s3=place.url,
                region=place.region,
                virtual_hosted_style_request=not place.path_style,
                # Signing the content is half of what a PUT costs, and TLS or checksums do as well.
                unsigned_payload=True,
                client_options=options,
                retry_config={"max_retries": _MAX_RETRIES, "retry_timeout": each},
                credential_provider=self._credentials,
            )
        except CLIENT_ERRORS:
            # What it says has their values in it.
            set_here = ", ".join(client_variables()) or "none of its variables is set"
            why = f"the S3 client takes no such environment: {set_here}"
            raise TierError(why, reason=Outcome.IO_ERROR) from None


def _read_certificate(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            certificate = file.read()
    except OSError as error:
        raise ConfigError(f"s3_tls_ca_file: {path}: {error.strerror or error}") from error
    if b"-----BEGIN CERTIFICATE-----" not in certificate:
        raise ConfigError(f"s3_tls_ca_file: {path}: has no certificate in PEM's form")
    return certificate
