"""How much of a store each salt takes, told by the ends of keys alone (ucm/store/blocks/keys.py).

A key tells its salt's tag and not the salt, and a key without a salt ends as if it had one that no
other key has. So an end that several keys have is a salt, and what has an end of its own has none,
or is all that its salt has stored.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import groupby
from typing import Final

import msgspec

from ucm.store.blocks.keys import SALT_TAG_BYTES, Key, salt_tag

_WORD: Final = "Q"
assert array(_WORD).itemsize == SALT_TAG_BYTES


class SaltUse(msgspec.Struct, frozen=True, kw_only=True):
    """`tag`, as `quota_gb` takes it, and `salt` are empty for what has none; `salt` also where
    nobody has named it."""

    tag: str
    salt: str
    num_pages: int
    allocated_bytes: int


class SaltTally:
    """24 bytes a page. Not for threads."""

    def __init__(self) -> None:
        self._tags, self._heads, self._nbytes = array(_WORD), array(_WORD), array(_WORD)

    def add(self, key: Key, allocated_bytes: int) -> None:
        self._tags.append(int.from_bytes(key[-SALT_TAG_BYTES:], "big"))
        self._heads.append(int.from_bytes(key[:SALT_TAG_BYTES], "big"))
        self._nbytes.append(allocated_bytes)

    def uses(self, known: Iterable[str] = ()) -> list[SaltUse]:
        """What takes most comes first, then what has no salt. `known` are salts to be named."""
        names = {int.from_bytes(salt_tag(salt), "big"): salt for salt in known}
        found: list[SaltUse] = []
        num_others = other_bytes = 0
        in_order = sorted(range(len(self._tags)), key=self._tags.__getitem__)
        for tag, group in groupby(in_order, key=self._tags.__getitem__):
            pages = list(group)
            nbytes = sum(self._nbytes[page] for page in pages)
            # One page may be stored twice: with a page key and without, or in two backends.
            if tag in names or len({self._heads[page] for page in pages}) > 1:
                digits = tag.to_bytes(SALT_TAG_BYTES, "big").hex()
                found.append(_use(digits, names.get(tag, ""), len(pages), nbytes))
            else:
                num_others += len(pages)
                other_bytes += nbytes
        found.sort(key=lambda use: -use.allocated_bytes)
        return [*found, _use("", "", num_others, other_bytes)]


def _use(tag: str, salt: str, num_pages: int, nbytes: int) -> SaltUse:
    return SaltUse(tag=tag, salt=salt, num_pages=num_pages, allocated_bytes=nbytes)
