"""Every object name of the S3 tier is built and parsed here.

    <prefix>/
      <namespace>/manifest.json
      <namespace>/<hhhh>/<page>               hhhh: first two bytes of the key
      quarantine/<namespace>/<page>.<random>  what was damaged

What namespaces and pages are called is what they are called as files (`page_names.py`).
"""

from __future__ import annotations

import re
import secrets

from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_names import (
    MANIFEST,
    PAGE_PATTERN,
    is_namespace_name,
    namespace_name,
    page_name,
    parse_page_name,
)

_RANDOM_BYTES = 8
QUARANTINE = "quarantine"
_ASIDE = re.compile(rf"{PAGE_PATTERN}\.[0-9a-f]{{16}}", re.ASCII)


class Names:
    """`key_id` is that of the page key, if pages are sealed."""

    def __init__(self, prefix: str, key_id: bytes = b"") -> None:
        self._below = f"{prefix}/" if prefix else ""
        self._key_id = key_id

    def manifest(self, fingerprint: bytes) -> str:
        return f"{self._below}{namespace_name(fingerprint, self._key_id)}/{MANIFEST}"

    def page(self, fingerprint: bytes, key: Key) -> str:
        name = page_name(key)
        return f"{self._below}{namespace_name(fingerprint, self._key_id)}/{name[:4]}/{name}"

    def quarantine(self, fingerprint: bytes, key: Key) -> str:
        """A new name, because the same page may be damaged twice."""
        folder = f"{self._below}{QUARANTINE}/{namespace_name(fingerprint, self._key_id)}"
        return f"{folder}/{page_name(key)}.{secrets.token_hex(_RANDOM_BYTES)}"


def parse_page(name: str) -> tuple[str, Key] | None:
    """The namespace and the key of a page, of a name without what is below the prefix. None: nobody
    looks for it there."""
    namespace, _, rest = name.partition("/")
    fan_out, _, page = rest.partition("/")
    if not is_namespace_name(namespace) or page[:4] != fan_out:
        return None
    key = parse_page_name(page)
    return None if key is None else (namespace, key)


def is_aside(name: str) -> bool:
    """Of a damaged object that a tier has moved aside."""
    parts = name.split("/")
    if len(parts) != 3 or parts[0] != QUARANTINE:
        return False
    return is_namespace_name(parts[1]) and _ASIDE.fullmatch(parts[2]) is not None
