"""Credentials from a file, as other programs write it:

    [default]
    aws_access_key_id = ...
    aws_secret_access_key = ...
    aws_session_token = ...

It is read again every minute, and when the server refuses what it had and it has been written
since, so that whatever renews it needs to tell nobody.
"""

from __future__ import annotations

import configparser
import os
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

from ucm.config.s3_environment import is_credential
from ucm.errors import TierError
from ucm.outcome import Outcome

if TYPE_CHECKING:
    from obstore.store import S3Credential

_SECTION = "default"
_READ_EVERY = timedelta(minutes=1)
# The client asks anew when what it has is valid for less than this.
_CLIENT_ASKS_BEFORE = timedelta(minutes=5)


class CredentialsFile:
    """What the client calls for credentials. Any thread."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._read: tuple[int, ...] = ()

    def has_changed(self) -> bool:
        """Since it was read."""
        return bool(self._read) and self._read != self._looks()

    def _looks(self) -> tuple[int, ...]:
        try:
            found = os.stat(self._path)
        except OSError:
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def __call__(self) -> S3Credential:
        """Raises TierError, which shows nothing of what is in the file."""
        parser = configparser.RawConfigParser()
        # Before it is opened: what is written meanwhile is a change.
        self._read = self._looks()
        try:
            with open(self._path, encoding="utf-8") as file:
                parser.read_file(file)
            found = parser[_SECTION]
            key_id, secret = found["aws_access_key_id"], found["aws_secret_access_key"]
            token = found.get("aws_session_token")
        except OSError as error:
            raise self._error(error.strerror or type(error).__name__) from None
        except (KeyError, ValueError, configparser.Error):
            needed = f"[{_SECTION}] with aws_access_key_id and aws_secret_access_key"
            raise self._error(f"has no {needed}") from None
        if not all(is_credential(each) for each in (key_id, secret, token or "")):
            raise self._error("has characters in a value that no credential has")
        return {
            "access_key_id": key_id,
            "secret_access_key": secret,
            "token": token,
            "expires_at": datetime.now(timezone.utc) + _CLIENT_ASKS_BEFORE + _READ_EVERY,
        }

    def _error(self, why: str) -> TierError:
        return TierError(f"s3_credentials_file: {self._path}: {why}", reason=Outcome.IO_ERROR)
