"""What lies in a storage backend, told by its names alone: what other nodes and people rely on.

Written down a second time, so that a name that ucm/store/tiers/posix/paths.py builds otherwise is
seen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ucm.store.blocks.keys import Key, TailKey

_FINGERPRINT = "(?P<fingerprint>[0-9a-f]{64})"
_FILE = r"(?P<key>[0-9a-f]{64})(\.(?P<tokens>[1-9][0-9]{0,4}))?\.kv"
_BLOCK = re.compile(
    rf"{_FINGERPRINT}(-[0-9a-f]{{16}})?/(?P<fan_out>[0-9a-f]{{2}}/[0-9a-f]{{2}})/{_FILE}"
)
_WRITER = "[A-Za-z0-9_]+-[0-9a-f]{16}(-[0-9]+){3}-[0-9a-f]{16}"
_ASIDE = re.compile(rf"quarantine/{_FINGERPRINT}/{_FILE}\.{_WRITER}")


@dataclass(frozen=True)
class BlockName:
    """Of the page of `key`, which is a TailKey for a tail's."""

    fingerprint: bytes
    key: Key


def block_of(path: str) -> BlockName | None:
    """`path` starts below the backend. None if it is no block's."""
    match = _BLOCK.fullmatch(path)
    if match is None or match["fan_out"] != f"{match['key'][:2]}/{match['key'][2:4]}":
        return None
    return _name(match)


def quarantined_block_of(path: str) -> BlockName | None:
    """`path` starts below the backend. None if it is no block's that was moved aside."""
    match = _ASIDE.fullmatch(path)
    return None if match is None else _name(match)


def _name(match: re.Match[str]) -> BlockName:
    key = bytes.fromhex(match["key"])
    if match["tokens"] is not None:
        key = TailKey(key, int(match["tokens"]))
    return BlockName(bytes.fromhex(match["fingerprint"]), Key(key))
