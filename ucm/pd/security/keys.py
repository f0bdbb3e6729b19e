"""API keys, of flags and of a file that is read anew while the proxy serves.

A file has one key a line; empty lines, and lines that begin with `#`, are none. Keys are what can
stand in a header as it is: printable ASCII without blanks. Nothing here says a key in an error or
in a log.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Coroutine, Sequence

from ucm.errors import ConfigError
from ucm.pd.security import followed, secret_files

_MAX_FILE_BYTES = 1 << 20


class Keys:
    """Those that were `given`, and those of `file`, which `flag` names, as they are now. Owned by
    the event loop's thread.

    Raises ConfigError when made if there is no key in the file; later such a file changes nothing:
    a proxy whose file of keys is just being written must not lock out everybody.
    """

    def __init__(self, given: tuple[str, ...], file: str | None, *, flag: str) -> None:
        self._given = given
        self._files = () if file is None else (file,)
        self._flag = flag
        # Before it is read: what changes meanwhile is read again.
        self._seen = followed.stamp(self._files)
        self._keys: tuple[str, ...] = ()
        self._digests: tuple[bytes, ...] = ()
        self._take(self._read())

    @property
    def are_asked_for(self) -> bool:
        return bool(self._keys)

    @property
    def first(self) -> str | None:
        """To be sent: flags come before the file."""
        return self._keys[0] if self._keys else None

    def has(self, key: str | None) -> bool:
        """How long it takes says neither which one it is, nor how much of it is right."""
        if not key:
            return False
        digest, found = _digest(key), False
        for each in self._digests:
            found |= hmac.compare_digest(digest, each)
        return found

    def following(self) -> list[Coroutine[None, None, None]]:
        """What keeps them as the file says, to be run until it is cancelled."""
        if not self._files:
            return []
        what = f"keys of {self._flag}"
        return [followed.follow(self._files, self._read, self._take, what=what, seen=self._seen)]

    def _read(self) -> tuple[str, ...]:
        """Raises ConfigError."""
        found = list(self._given)
        for path in self._files:
            found += read_keys(path, flag=self._flag)
        return tuple(found)

    def _take(self, keys: Sequence[str]) -> None:
        self._keys = tuple(keys)
        self._digests = tuple(map(_digest, self._keys))


def read_keys(path: str, *, flag: str) -> list[str]:
    """Raises ConfigError for a file that can't be read, or has no key, or something else."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{flag}: {path}: {error.strerror}") from error
    secret_files.judge(path, flag=flag)
    if len(text) > _MAX_FILE_BYTES:
        raise ConfigError(f"{flag}: {path} has more than 1 MiB: that is no file of keys")
    lines = [line.strip() for line in text.decode("utf-8", "replace").splitlines()]
    keys = []
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith("#"):
            if not is_key(line):
                raise ConfigError(f"{flag}: {path}, line {number}: {NO_KEY}")
            keys.append(line)
    if not keys:
        raise ConfigError(f"{flag}: {path} has no key: give one a line")
    return keys


NO_KEY = "a key is printable ASCII without blanks"


def is_key(text: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
