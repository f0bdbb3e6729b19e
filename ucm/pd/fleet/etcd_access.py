"""How etcd is reached: its endpoints, TLS, a user. And the flags that say so.

The proxy and the registrar have the same flags. Files are read at the start, where a mistake in
them is one line, and again whenever a connection or an authentication has to be made anew after a
failure: certificates and passwords are replaced while processes run.
"""

from __future__ import annotations

import argparse
import ssl
from dataclasses import dataclass
from pathlib import Path

from yarl import URL

from ucm.errors import ConfigError
from ucm.pd.security import secret_files, tls
from ucm.pd.security.credentials import check_goes_with


@dataclass(frozen=True, kw_only=True)
class EtcdAccess:
    """At least one endpoint, in the order in which they are asked."""

    endpoints: tuple[URL, ...]
    # None: the authorities that the system trusts.
    ca_file: str | None = None
    cert_file: str | None = None
    # None: the key is in `cert_file`.
    key_file: str | None = None
    user: str | None = None
    # There is one if there is a user. A flag would show the password to everybody on the machine.
    password_file: str | None = None

    def tls_context(self) -> ssl.SSLContext:
        """Reads files. Raises ConfigError."""
        return tls.of_a_client(self.ca_file, self.cert_file, self.key_file, flags="--etcd")

    def password(self) -> str:
        """Reads the file, without the end of its line. Raises ConfigError."""
        assert self.password_file is not None
        try:
            password = Path(self.password_file).read_text().rstrip("\r\n")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--etcd-password-file: {self.password_file}: can't be read: {error}"
            ) from error
        secret_files.judge(self.password_file, flag="--etcd-password-file")
        if not password:
            raise ConfigError(f"--etcd-password-file: {self.password_file}: there is no password")
        return password

    def check(self) -> None:
        """Reads all files, to have mistakes in them found at the start. Raises ConfigError."""
        if any(url.scheme == "https" for url in self.endpoints):
            self.tls_context()
        if self.user is not None:
            self.password()


def etcd_endpoints(addresses: str, *, scheme: str = "http") -> tuple[URL, ...]:
    """`host:port` or `http://host:port`, or several with commas between. Raises ConfigError."""
    urls = tuple(_endpoint(each.strip(), scheme) for each in addresses.split(","))
    for i, url in enumerate(urls):
        if url in urls[:i]:
            raise ConfigError(f"--etcd-addr: {url} is there twice")
    return urls


def add_etcd_flags(parser: argparse.ArgumentParser, *, is_required: bool) -> None:
    add = parser.add_argument
    add(
        "--etcd-addr",
        required=is_required,
        help="host:port of the etcd in which instances are registered; of several, with commas",
    )
    add("--etcd-ca-file", help="who vouches for etcd's certificate, in PEM; turns TLS on")
    add("--etcd-cert-file", help="client certificate for etcd, in PEM; turns TLS on")
    add("--etcd-key-file", help="its key, unless it is in the same file")
    add("--etcd-user", help="user of etcd, if authentication is enabled there")
    add("--etcd-password-file", help="a file that holds its password and nothing else")


def etcd_access(args: argparse.Namespace) -> EtcdAccess | None:
    """What the flags say; None without `--etcd-addr`. Reads files. Raises ConfigError."""
    given = {
        name: value for name in _FIELDS if (value := getattr(args, f"etcd_{name}")) is not None
    }
    if args.etcd_addr is None:
        for name in given:
            raise ConfigError(f"--etcd-{name.replace('_', '-')} is of no use without --etcd-addr")
        return None
    is_tls = bool(given.keys() & {"ca_file", "cert_file", "key_file"})
    check_goes_with(args, "etcd_key_file", "etcd_cert_file")
    endpoints = etcd_endpoints(args.etcd_addr, scheme="https" if is_tls else "http")
    access = EtcdAccess(endpoints=endpoints, **given)
    _check_flags(access, is_tls=is_tls)
    access.check()
    return access


_FIELDS = ("ca_file", "cert_file", "key_file", "user", "password_file")


def _check_flags(access: EtcdAccess, *, is_tls: bool) -> None:
    """Raises ConfigError for flags that contradict each other."""
    for url in access.endpoints:
        if is_tls and url.scheme == "http":
            raise ConfigError(
                f"--etcd-addr: {url} is asked without TLS, so files of certificates are of no"
                f" use: write https://"
            )
    if access.user is not None and ":" in access.user:
        raise ConfigError(
            "--etcd-user takes a name alone, since everybody on the machine can see it: write the"
            " password into a file for --etcd-password-file"
        )
    if (access.password_file is None) != (access.user is None):
        raise ConfigError("--etcd-user and --etcd-password-file need each other")


def _endpoint(address: str, scheme: str) -> URL:
    """Raises ConfigError."""
    try:
        url = URL(address if "://" in address else f"{scheme}://{address}")
        is_whole = url.scheme in ("http", "https") and url.host and url.explicit_port
        if is_whole and url == url.origin():
            return url
    except ValueError:
        pass
    raise ConfigError(f"{_without_secrets(address)!r} is no etcd: give it as host:port")


def _without_secrets(address: str) -> str:
    """It may be of the form user:password@host:port, and what is wrong goes into logs."""
    return f"...@{address.rpartition('@')[2]}" if "@" in address else address
