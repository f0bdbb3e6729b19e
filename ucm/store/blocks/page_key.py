"""A secret that pages are sealed with, so that nobody without it can forge one.

Checksums find what storage damages; whoever can write into a backend can compute them as well. With
`page_key_file` every page carries an HMAC-SHA256 over its header and content (1.4 GB/s and core
where XXH3 does 13). Sealed pages lie in directories of their own, named by the key's id: nodes with
different keys, or with none, don't find each other's, and never take one for damaged.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from dataclasses import dataclass, field

from ucm.errors import ConfigError

SEAL_BYTES = 32
ID_BYTES = 8
NO_KEY_ID = bytes(ID_BYTES)
_MIN_SECRET_BYTES = 16
_MAX_SECRET_BYTES = 4096


@dataclass(frozen=True)
class PageKey:
    """`id` tells keys apart and says nothing about the secret."""

    id: bytes
    _secret: bytes = field(repr=False)

    @classmethod
    def of(cls, secret: bytes) -> PageKey:
        return cls(hashlib.sha256(b"ucm-page-key-id\0" + secret).digest()[:ID_BYTES], secret)

    def seal(self, header: memoryview, page: memoryview) -> bytes:
        """For a file with this header, up to the seal, and this page, without its padding."""
        seal = hmac.new(self._secret, header, "sha256")
        seal.update(page)
        return seal.digest()


def page_key_of(path: str | None) -> PageKey | None:
    """That of the setting `page_key_file`; None without one. Raises ConfigError."""
    return load_page_key(path) if path is not None else None


def load_page_key(path: str) -> PageKey:
    """The secret is the file's content without blanks at its ends. Raises ConfigError."""
    try:
        # A FIFO would keep who opens it.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            os.close(fd)
            raise ConfigError(f"page_key_file: {path}: is no file with a secret in it")
        with open(fd, "rb") as file:
            secret = file.read(_MAX_SECRET_BYTES + 1).strip()
    except OSError as error:
        raise ConfigError(f"page_key_file: {path}: can't be read: {error.strerror}") from error
    if mode & 0o077 & ~0o040:
        raise ConfigError(f"page_key_file: {path}: others may read or change it: chmod 600 it")
    if not _MIN_SECRET_BYTES <= len(secret) <= _MAX_SECRET_BYTES:
        raise ConfigError(
            f"page_key_file: {path}: expected {_MIN_SECRET_BYTES} to {_MAX_SECRET_BYTES} bytes, "
            f"such as `openssl rand -hex 32` prints"
        )
    return PageKey.of(secret)
