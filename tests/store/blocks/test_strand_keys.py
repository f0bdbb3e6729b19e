"""Keys of strands: the scheme is pinned by golden vectors, and its promises by properties."""

from __future__ import annotations

import hashlib
import struct

from hypothesis import given
from hypothesis import strategies as st

from ucm.store.blocks.keys import (
    KEY_BYTES,
    Key,
    TailKey,
    block_keys,
    num_tokens_of,
    root_key,
    salt_tag,
    strand_key,
    tail_key,
)

BLOCK_TOKENS = 4
TOKENS = (1, 2, 3, 4, 0, 255, 65536, 4294967295, 7, 7, 7, 7, 9)
FINGERPRINT = bytes(range(32))
# Of the golden prompt, as its other tests have them; the second with the salt "tenant-1".
PLAIN = Key(bytes.fromhex("38cfe0397850fa1e007e157d4165928f5a5e7da9170d019373d8676336e548ec"))
SALTED = Key(bytes.fromhex("10ec5187ee5100890e15592ef993ac85e640db0d7bb4bec70b3fb24da95adcc1"))


def test_the_keys_of_known_strands_never_change() -> None:
    """Every store out there is named by these bytes."""
    window = strand_key(PLAIN, "window-128/8x64+64/2", is_salted=False)
    tail = strand_key(Key(TailKey(SALTED, 3)), "chunk-8192/8x128+128/2", is_salted=True)

    assert window.hex() == "f25cc9e62297ea4aa7972df4e5027cbaf13269e479ddb5467f355545762a0da3"
    assert tail.hex() == "26f2af4d9804fe142b2a4ede635a88c202268875ba25ca250b3fb24da95adcc1"
    assert tail.endswith(salt_tag("tenant-1"))


@given(
    st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=3, unique=True),
    st.none() | st.text(max_size=5),
    st.integers(1, BLOCK_TOKENS - 1),
)
def test_no_two_strands_and_no_strand_and_a_block_have_one_key(
    names: list[str], salt: str | None, tail_tokens: int
) -> None:
    """And whatever is told of a key by its end or its length is told of its strands'."""
    root = root_key(FINGERPRINT, lora_digest=None, cache_salt=salt)
    keys = block_keys(root, TOKENS, block_tokens=BLOCK_TOKENS, cache_salt=salt)
    tail = tail_key(
        root, TOKENS[:tail_tokens], block_tokens=BLOCK_TOKENS, first_token=0, cache_salt=salt
    )
    base = [*keys, tail]
    strands = {
        name: [strand_key(key, name, is_salted=salt is not None) for key in base] for name in names
    }

    everything = [*base, *(key for each in strands.values() for key in each)]
    assert len(everything) == len(set(everything)) == len(base) * (1 + len(names))
    for each in strands.values():
        assert [num_tokens_of(key, block_tokens=BLOCK_TOKENS) for key in each] == [
            num_tokens_of(key, block_tokens=BLOCK_TOKENS) for key in base
        ]
        assert {len(key) for key in each} == {KEY_BYTES}
        assert salt is None or {key[-8:] for key in each} == {salt_tag(salt)}


def test_a_strands_key_is_what_the_docstring_says() -> None:
    """The scheme written out by hand."""

    def field(value: bytes) -> bytes:
        return struct.pack("<I", len(value)) + value

    key = Key(bytes(range(32)))
    expected = hashlib.sha256(field(b"ucm-strand-1") + field("fenêtre".encode()) + key).digest()

    assert strand_key(key, "fenêtre", is_salted=False) == expected
    assert strand_key(key, "fenêtre", is_salted=True) == expected[:24] + key[24:]
