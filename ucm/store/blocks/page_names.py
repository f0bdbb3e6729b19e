"""What a page and its namespace are called where they are kept, whatever keeps them.

<namespace fingerprint>                   or <namespace fingerprint>-<id of the page key>
<key>.kv                                  or, of a tail of so many tokens, <key>.<tokens>.kv

Fingerprints, ids and keys are in lower-case hex.
"""

from __future__ import annotations

import re

from ucm.store.blocks.keys import SALT_TAG_BYTES, Key, TailKey

BLOCK_SUFFIX = ".kv"
MANIFEST = "manifest.json"
# What is longer is none.
MAX_MANIFEST_BYTES = 1 << 20
PAGE_PATTERN = r"[0-9a-f]{64}(\.[1-9]\d{0,4})?\.kv"

_KEY_DIGITS = 64
_PAGE_NAME = re.compile(PAGE_PATTERN, re.ASCII)
_NAMESPACE_NAME = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{16})?", re.ASCII)


def namespace_name(fingerprint: bytes, key_id: bytes = b"") -> str:
    """`key_id` is that of the page key, if pages are sealed."""
    sealed = f"-{key_id.hex()}" if key_id else ""
    return f"{fingerprint.hex()}{sealed}"


def is_namespace_name(name: str) -> bool:
    return _NAMESPACE_NAME.fullmatch(name) is not None


def fingerprint_in(namespace: str) -> bytes:
    return bytes.fromhex(namespace.partition("-")[0])


def key_id_in(namespace: str) -> bytes:
    """The id of the page key in the name of a namespace; empty without one."""
    return bytes.fromhex(namespace.partition("-")[2])


def page_name(key: Key) -> str:
    tokens = f".{key.num_tokens}" if isinstance(key, TailKey) else ""
    return f"{key.hex()}{tokens}{BLOCK_SUFFIX}"


def is_page_name(name: str) -> bool:
    return _PAGE_NAME.fullmatch(name) is not None


def is_tail_name(name: str) -> bool:
    """Of a page that is a tail's."""
    return len(name) > _KEY_DIGITS + len(BLOCK_SUFFIX)


def key_in(name: str) -> Key:
    """The key in the name of a page."""
    return Key(bytes.fromhex(name[:_KEY_DIGITS]))


def salt_tag_in(name: str) -> bytes:
    """What the key in the name of a page ends with: the tag of its salt if it has one, else part of
    a digest."""
    return bytes.fromhex(name[_KEY_DIGITS - 2 * SALT_TAG_BYTES : _KEY_DIGITS])


def parse_page_name(name: str) -> Key | None:
    """The whole key, a TailKey for a tail's. None: it is no page's."""
    if not is_page_name(name):
        return None
    key = key_in(name)
    return Key(TailKey(key, int(name.split(".")[1]))) if is_tail_name(name) else key
