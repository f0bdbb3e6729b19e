"""What the S3 client takes from the environment by itself, as far as people have to be told of it.
Of credentials no more is looked at than whether they can be any."""

from __future__ import annotations

import os
import re
from typing import Final

_CREDENTIALS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_CREDENTIAL: Final = re.compile(r"[!-~]*", re.ASCII)


def is_credential(text: str) -> bool:
    """Others can't be sent to a server: mostly they have a line's end that nobody sees."""
    return _CREDENTIAL.fullmatch(text) is not None


def bad_credential() -> str:
    """The name of a variable whose value can be none. Empty: there is none."""
    bad = (name for name in _CREDENTIALS if not is_credential(os.environ.get(name, "")))
    return next(bad, "")


def client_variables() -> list[str]:
    """The names of those that it may have settings from, none with a credential among them."""
    found = {name for name in os.environ if name.startswith("AWS_")}
    return sorted(found.difference(_CREDENTIALS))
