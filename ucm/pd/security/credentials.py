"""Flags about keys and certificates, of the proxy and of the registrar."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from ucm.errors import ConfigError
from ucm.pd.security.keys import NO_KEY, is_key


@dataclass(frozen=True, kw_only=True)
class InstanceFiles:
    """Certificates with which https instances are met."""

    instance_ca_file: str | None = None
    instance_cert_file: str | None = None
    instance_key_file: str | None = None


def add_keys(parser: argparse.ArgumentParser) -> None:
    """Of clients, of each side, and the admin's."""
    add = parser.add_argument
    more = {"nargs": "+", "action": "append", "default": None}
    add("--api-key", type=_key, help="clients need one of these", **more)  # type: ignore[arg-type]
    for name, kind, what in (
        ("prefill-api-key", _key, "prefill instances are asked with it, not the client's"),
        ("decode-api-key", _key, "decode instances are asked with it, not the client's"),
        ("worker-api-key", _key, "workers are asked with it, not the client's"),
        ("admin-key", _secret, "who sends it as a bearer token may change /instances"),
    ):
        add(f"--{name}", type=kind, help=what)
    for name in ("api-key", "prefill-api-key", "decode-api-key", "worker-api-key", "admin-key"):
        add(f"--{name}-file", help=f"keys as of --{name}, one a line, read anew when it changes")


def add_own_files(parser: argparse.ArgumentParser) -> None:
    """For TLS of the proxy's own, by the names that vLLM has for them."""
    add = parser.add_argument
    add("--ssl-certfile", help="the proxy's certificate, with what leads to its authority: https")
    add("--ssl-keyfile", help="its key, unless that is in the same file")


def add_instance_files(parser: argparse.ArgumentParser) -> None:
    """The flags of InstanceFiles."""
    add = parser.add_argument
    add("--instance-ca-file", help="authorities of https instances, instead of the system's")
    add("--instance-cert-file", help="the certificate to show https instances")
    add("--instance-key-file", help="its key, unless that is in the same file")


def instance_files(args: argparse.Namespace) -> InstanceFiles:
    """Raises ConfigError."""
    check_goes_with(args, "instance_key_file", "instance_cert_file")
    return InstanceFiles(
        instance_ca_file=args.instance_ca_file,
        instance_cert_file=args.instance_cert_file,
        instance_key_file=args.instance_key_file,
    )


def check_goes_with(args: argparse.Namespace, key: str, cert: str) -> None:
    """Raises ConfigError for a key without a certificate."""
    if getattr(args, key) is not None and getattr(args, cert) is None:
        missing, given = (f"--{name.replace('_', '-')}" for name in (cert, key))
        raise ConfigError(f"{missing} is missing: {given} is of no use without it")


def _secret(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty: leave it out, or give a key")
    return text


def _key(text: str) -> str:
    if not is_key(text):
        raise argparse.ArgumentTypeError(NO_KEY)
    return text
