"""Every object name of the S3 tier is built here.

    <prefix>/
      <namespace>/manifest.json
      <namespace>/<hhhh>/<page>               hhhh: first two bytes of the key
      quarantine/<namespace>/<page>.<random>  what was damaged

What namespaces and pages are called is what they are called as files (`page_names.py`).
"""

from __future__ import annotations

import secrets

from ucm.store.blocks.keys import Key
from ucm.store.blocks.page_names import MANIFEST, namespace_name, page_name

_RANDOM_BYTES = 8


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
        folder = f"{self._below}quarantine/{namespace_name(fingerprint, self._key_id)}"
        return f"{folder}/{page_name(key)}.{secrets.token_hex(_RANDOM_BYTES)}"
