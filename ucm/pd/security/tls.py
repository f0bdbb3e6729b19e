"""Certificates: the proxy's own, and those with which it meets its engines.

When a file changes, a new context is made of all files, which holds for new connections. None is
ever changed: connections may be made of it at that moment, in another thread.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Coroutine, Sequence
from typing import Generic, TypeVar

from ucm.errors import ConfigError
from ucm.pd.security import followed, secret_files
from ucm.pd.security.credentials import InstanceFiles

_Context = TypeVar("_Context")


class Followed(Generic[_Context]):
    """What `make` makes of the files as they are now. Owned by the event loop's thread. Raises
    ConfigError when made for files that can't be used; later such ones change nothing."""

    def __init__(self, files: Sequence[str | None], make: Callable[[], _Context]) -> None:
        self._files = [each for each in files if each is not None]
        self._make = make
        # Before they are read: what changes meanwhile is read again.
        self._seen = followed.stamp(self._files)
        self.now = make()

    def following(self) -> list[Coroutine[None, None, None]]:
        """What reads changed files, to be run until it is cancelled."""
        if not self._files:
            return []
        what, seen = "certificates", self._seen
        return [followed.follow(self._files, self._make, self._take, what=what, seen=seen)]

    def _take(self, made: _Context) -> None:
        self.now = made


def of_a_client(ca: str | None, cert: str | None, key: str | None, *, flags: str) -> ssl.SSLContext:
    """Reads files, which `flags` with -ca-file and so on behind it name. Raises ConfigError."""
    if ca is None:
        context = ssl.create_default_context()
    else:
        # The system's authorities are then not trusted.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        _load_ca(context, ca, f"{flags}-ca-file")
    if cert is not None:
        _load_chain(context, cert, key, (f"{flags}-cert-file", f"{flags}-key-file"))
    return context


def of_instances(files: InstanceFiles) -> Followed[ssl.SSLContext | bool]:
    """For https instances: as Python has it unless a file says otherwise."""

    def make() -> ssl.SSLContext | bool:
        if files.instance_ca_file is None and files.instance_cert_file is None:
            return True
        return of_a_client(
            files.instance_ca_file,
            files.instance_cert_file,
            files.instance_key_file,
            flags="--instance",
        )

    return Followed(
        (files.instance_ca_file, files.instance_cert_file, files.instance_key_file), make
    )


def of_the_proxy(cert: str | None, key: str | None) -> Followed[ssl.SSLContext | None]:
    """For what the proxy serves, without TLS None. Listen with the first context: it takes on what
    is made later."""

    def make() -> ssl.SSLContext | None:
        if cert is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _load_chain(context, cert, key, ("--ssl-certfile", "--ssl-keyfile"))
        return context

    made = Followed((cert, key), make)

    def renew(handshake: ssl.SSLSocket | ssl.SSLObject, name: str | None, _: object) -> None:
        del name
        if made.now is not None:
            handshake.context = made.now

    if made.now is not None:
        made.now.sni_callback = renew
    return made


def _load_ca(context: ssl.SSLContext, path: str, flag: str) -> None:
    """Raises ConfigError."""
    _check_readable(path, flag)
    try:
        context.load_verify_locations(cafile=path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag}: {path} has no certificates: {error}") from error


def _load_chain(
    context: ssl.SSLContext, cert: str, key: str | None, flags: tuple[str, str]
) -> None:
    """Raises ConfigError."""
    _check_readable(cert, flags[0])
    if key is None:
        secret_files.judge(cert, flag=flags[0])
    else:
        _check_readable(key, flags[1])
        secret_files.judge(key, flag=flags[1])
    try:
        # Without a password at hand OpenSSL would ask for it, and nobody is there to answer.
        context.load_cert_chain(cert, key, password=lambda: "")
    except (OSError, ValueError) as error:
        where = cert if key is None else f"{cert} and {key}"
        raise ConfigError(
            f"{flags[0]}: {where} are no certificate with its unencrypted key: {error}"
        ) from error


def _check_readable(path: str, flag: str) -> None:
    """What OpenSSL says of such a file names neither the file nor the flag."""
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(f"{flag}: {path}: {error.strerror}") from error
