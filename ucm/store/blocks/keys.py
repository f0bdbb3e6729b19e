"""Tokens to keys: the names of blocks.

    key[-1] = SHA256( field("ucm-key-1") field(fingerprint) optional(LoRA digest) optional(salt) )
    key[i]  = SHA256( key[i-1] u32(n) n x u32(token) u32(m) m x extra )
    tail    = the same, with the n tokens that are left behind the last full block
    extra   = field(content hash) i64(item start - block start) u64(item length)
    salted  = key[i] or tail, its last 8 bytes replaced by SHA256( field("ucm-salt-1") field(salt) )
    strand  = SHA256( field("ucm-strand-1") field(strand's name) key[i] or tail, as above );
              salted, its last 8 bytes are those of that key

    field(b)    = u32(len(b)) b
    optional(x) = 00 when there is none, else 01 field(x)

Integers are little-endian, text is UTF-8. Every field says its own length, so two different inputs
never spell the same bytes. A key thus covers all tokens from the start of the prompt to the end
of its block, and everything else that shaped their KV: two prompts share keys exactly as far as
they share a prefix.

A key that was made with a salt ends with the salt's tag, so that a store can tell the pages of one
tenant from those of another: for quotas, by the names of files alone. Who may list the store can
so tell whether a salt that they guess is in use; content can't be found by it.

A model whose layers need unlike parts of a prompt keeps several pages of a block, one for each
strand of layers. The keys above are those of its base strand, and of all other models; the page of
another strand has a key that is made of the base's.

Golden vectors in the tests pin the scheme. Changing one byte of it means a new KEY_FORMAT.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Final, NewType

if TYPE_CHECKING:
    from typing_extensions import Self

Key = NewType("Key", bytes)

KEY_BYTES: Final = 32
KEY_FORMAT: Final = b"ucm-key-1"
SALT_TAG_BYTES: Final = 8
_SALT_FORMAT: Final = b"ucm-salt-1"
_STRAND_FORMAT: Final = b"ucm-strand-1"

_EXTRA_PLACE: Final = struct.Struct("<qQ")
_NO_EXTRAS: Final = struct.pack("<I", 0)


class TailKey(bytes):
    """The key of a tail: the `num_tokens` at a prompt's end that fill no block. Whoever handles
    keys need not know: it is told apart only where tails are named, filled up or evicted."""

    num_tokens: int

    def __new__(cls, key: bytes, num_tokens: int) -> Self:
        made = super().__new__(cls, key)
        made.num_tokens = num_tokens
        return made


@dataclass(frozen=True)
class Item:
    """A multimodal item of a prompt: tokens [start, start + length) stand for `identifier`.

    The identifier names the item's content, and is no name that a request or its engine gives it.
    """

    identifier: str
    start: int
    length: int


@dataclass(frozen=True)
class Extra:
    """What an overlapping item adds to one block's key. `offset` is the item's start relative to
    the block's start: negative where the item began in an earlier block."""

    content_hash: bytes
    offset: int
    length: int


def root_key(fingerprint: bytes, *, lora_digest: bytes | None, cache_salt: str | None) -> Key:
    """The parent of every first block: the namespace, and what applies to a prompt as a whole."""
    salt = None if cache_salt is None else _text(cache_salt)
    return Key(
        sha256(
            _field(KEY_FORMAT) + _field(fingerprint) + _optional(lora_digest) + _optional(salt)
        ).digest()
    )


def salt_tag(cache_salt: str) -> bytes:
    """The end of every key that is made with this salt."""
    return sha256(_field(_SALT_FORMAT) + _field(_text(cache_salt))).digest()[:SALT_TAG_BYTES]


def block_keys(
    parent: Key,
    tokens: Sequence[int],
    *,
    block_tokens: int,
    items: Sequence[Item] = (),
    first_token: int = 0,
    cache_salt: str | None = None,
) -> list[Key]:
    """One key per full block of `tokens`; a partial last block has no key. `cache_salt` is the one
    of the root key.

    `tokens` are the prompt's [first_token, first_token + len(tokens)), and `parent` is the key of
    the block before them (the root key when first_token is 0), so a prompt that grows is continued
    where it ended. `items` are in prompt coordinates; those outside of `tokens` are ignored.
    """
    assert len(parent) == KEY_BYTES, f"a parent key of {len(parent)} bytes"
    assert block_tokens > 0, f"block_tokens={block_tokens}"
    assert first_token % block_tokens == 0, "a continued prompt starts at a block's border"
    num_blocks = len(tokens) // block_tokens
    if num_blocks == 0:
        return []
    token_bytes = memoryview(_u32s(tokens[: num_blocks * block_tokens]))
    extras = extras_by_block(
        items, block_tokens=block_tokens, first_block=first_token // block_tokens
    )
    block_bytes = 4 * block_tokens
    tag = b"" if cache_salt is None else salt_tag(cache_salt)
    keys: list[Key] = []
    key = parent
    for block in range(num_blocks):
        of_block = token_bytes[block * block_bytes : (block + 1) * block_bytes]
        key = _key(key, block_tokens, of_block, extras.get(block), tag)
        keys.append(key)
    return keys


def tail_key(
    parent: Key,
    tokens: Sequence[int],
    *,
    block_tokens: int,
    first_token: int,
    items: Sequence[Item] = (),
    cache_salt: str | None = None,
) -> Key:
    """The key of a prompt's last `tokens`, fewer than a block, which start at `first_token`. Only
    a prompt that ends with exactly these has it."""
    assert 0 < len(tokens) < block_tokens and first_token % block_tokens == 0
    extras = extras_by_block(
        items, block_tokens=block_tokens, first_block=first_token // block_tokens
    )
    tag = b"" if cache_salt is None else salt_tag(cache_salt)
    key = _key(parent, len(tokens), memoryview(_u32s(tokens)), extras.get(0), tag)
    return Key(TailKey(key, len(tokens)))


def strand_key(key: Key, name: str, *, is_salted: bool) -> Key:
    """The key that the page of the strand `name` has, of the block (or tail) whose base strand's
    page has `key`. `is_salted`: whether that was made with a salt, whose tag both end with."""
    assert name, "the base strand's pages have the block's own keys"
    tag = key[-SALT_TAG_BYTES:] if is_salted else b""
    digest = sha256(_field(_STRAND_FORMAT) + _field(_text(name)) + key).digest()
    made = digest[: KEY_BYTES - len(tag)] + tag
    return Key(TailKey(made, key.num_tokens) if isinstance(key, TailKey) else made)


def prompt_keys(
    root: Key,
    tokens: Sequence[int],
    *,
    block_tokens: int,
    items: Sequence[Item] = (),
    cache_salt: str | None = None,
    with_tail: bool,
) -> list[Key]:
    """Of a prompt's full blocks; `with_tail` also of what is left behind them. A single token has
    no tail: a hit must leave something computed in front of the last token, which vLLM computes
    again."""
    keys = block_keys(root, tokens, block_tokens=block_tokens, items=items, cache_salt=cache_salt)
    start = len(keys) * block_tokens
    if with_tail and start < len(tokens) and len(tokens) > 1:
        tail = tail_key(
            keys[-1] if keys else root,
            tokens[start:],
            block_tokens=block_tokens,
            first_token=start,
            items=items,
            cache_salt=cache_salt,
        )
        keys.append(tail)
    return keys


def num_tokens_of(key: Key, *, block_tokens: int) -> int:
    return key.num_tokens if isinstance(key, TailKey) else block_tokens


def _key(
    parent: Key, num_tokens: int, tokens: memoryview, extras: Sequence[Extra] | None, tag: bytes
) -> Key:
    digest = sha256(parent)
    digest.update(struct.pack("<I", num_tokens))
    digest.update(tokens)
    digest.update(encode_extras(extras) if extras else _NO_EXTRAS)
    return Key(digest.digest()[: KEY_BYTES - len(tag)] + tag)


def extras_by_block(
    items: Iterable[Item], *, block_tokens: int, first_block: int = 0
) -> dict[int, list[Extra]]:
    """The extras of each block that some item overlaps, counted from `first_block`.

    In the order of the items' positions, whatever order they were given in.
    """
    extras: dict[int, list[Extra]] = {}
    for item in sorted(items, key=lambda item: (item.start, item.length, item.identifier)):
        content_hash = _text(item.identifier)
        # An item [start, end) touches blocks [start // n, ceil(end / n)).
        end_block = -(-(item.start + item.length) // block_tokens)
        for block in range(max(first_block, item.start // block_tokens), end_block):
            extra = Extra(content_hash, item.start - block * block_tokens, item.length)
            extras.setdefault(block - first_block, []).append(extra)
    return extras


def encode_extras(extras: Sequence[Extra]) -> bytes:
    parts = [struct.pack("<I", len(extras))]
    for extra in extras:
        parts.append(_field(extra.content_hash))
        parts.append(_EXTRA_PLACE.pack(extra.offset, extra.length))
    return b"".join(parts)


def _field(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


def _optional(value: bytes | None) -> bytes:
    return b"\x00" if value is None else b"\x01" + _field(value)


def _text(value: str) -> bytes:
    # A salt comes out of somebody's JSON, where "\ud800" is legal: it must name something, not
    # raise in the middle of an engine step.
    return value.encode("utf-8", "surrogatepass")


def _u32s(tokens: Sequence[int]) -> bytes:
    values = array("I", tokens)
    assert values.itemsize == 4
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()
