"""What a page and its namespace are called where they are kept, whatever keeps them.

<namespace fingerprint>                   or <namespace fingerprint>-<id of the page key>
<key>.kv                                  or, of a tail of so many tokens, <key>.<tokens>.kv
"""

from __future__ import annotations

from ucm.store.blocks.keys import Key, TailKey

BLOCK_SUFFIX = ".kv"
MANIFEST = "manifest.json"


def namespace_name(fingerprint: bytes, key_id: bytes = b"") -> str:
    """`key_id` is that of the page key, if pages are sealed."""
    sealed = f"-{key_id.hex()}" if key_id else ""
    return f"{fingerprint.hex()}{sealed}"


def page_name(key: Key) -> str:
    tokens = f".{key.num_tokens}" if isinstance(key, TailKey) else ""
    return f"{key.hex()}{tokens}{BLOCK_SUFFIX}"
