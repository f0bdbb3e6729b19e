"""Keys: the scheme is pinned by golden vectors, and its promises by properties."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.store.blocks.keys import (
    KEY_BYTES,
    Extra,
    Item,
    Key,
    block_keys,
    encode_extras,
    extras_by_block,
    root_key,
    salt_tag,
    tail_key,
)

FINGERPRINT = bytes(range(32))
LORA = bytes(range(100, 132))
BLOCK_TOKENS = 4
TOKENS = (1, 2, 3, 4, 0, 255, 65536, 4294967295, 7, 7, 7, 7, 9)
IMAGES = (Item("cafe01", 2, 4), Item("beef02", 7, 1))

# (lora_digest, cache_salt, items), the root, and the keys of TOKENS in blocks of 4.
# Never edit a line: a scheme that gives other keys is a new KEY_FORMAT.
GOLDEN: dict[str, tuple[tuple[bytes | None, str | None, tuple[Item, ...]], str, list[str]]] = {
    "plain": (
        (None, None, ()),
        "830e620e1c8352bf2784eece1f7ca3ef9da79d57ea8570f8502fc6788d9833cd",
        [
            "38cfe0397850fa1e007e157d4165928f5a5e7da9170d019373d8676336e548ec",
            "96acf98aa01e5266393e1b11aa4b8226ba4574d36974cc339929dbb80e6b0805",
            "28e9618c652c68ccd46f06fea807b626e4e64c8a3d59d0bef2f2d597fc67654d",
        ],
    ),
    "salt": (
        (None, "tenant-1", ()),
        "9d4db585e019d7c3676986cd3480a4c6e92231c4be7b3fbbe8411b1d3f9d1874",
        [
            "10ec5187ee5100890e15592ef993ac85e640db0d7bb4bec70b3fb24da95adcc1",
            "ce0ffcdaed5068309e3ca60588034f075da024edff4e515f0b3fb24da95adcc1",
            "db8c0899a119df266cca6b6fb87d94361735913fb461658c0b3fb24da95adcc1",
        ],
    ),
    "lora": (
        (LORA, None, ()),
        "eb9de09f1f2d51a0eb4cbf227d714e3eae2d3bfb5ef2850f596cbe867cc3219c",
        [
            "4911f29f3499ce448977f97b8418dec712ee55347626cc6f497368317c96173d",
            "e23eb2ef411ed34ace0478de5c78178d69e1b1e4dd6c549f82a0eaab58dd1619",
            "332c081a489cf59eb5975c94c2e19895be6df11ae031668c7948c391415d94dc",
        ],
    ),
    "multimodal": (
        (None, None, IMAGES),
        "830e620e1c8352bf2784eece1f7ca3ef9da79d57ea8570f8502fc6788d9833cd",
        [
            "8953967f7437b6c52a67de9e1f36eebdde0b22825e20fd6893664cfefbbc121e",
            "991014a2720ab8d0b73ad539a87416bb786b0bb83c958e788be2c875bbf884b7",
            "d708f52609dc814ecd9b111a3c6a29b6caae45b9bdd6375a3e52abc3784a2e13",
        ],
    ),
    "all of them": (
        (LORA, "tenant-1", IMAGES),
        "371ecfafd77c65c6e19be213c2b5a3a73385f9571c82702cef7bf0cf130133f2",
        [
            "afd16f6b1acb971021bd6f9bea8d113839d78404feaa390f0b3fb24da95adcc1",
            "97515489e8ed558e4ee41892bf5c313ddb632d3a91a12e520b3fb24da95adcc1",
            "f2189c42fdfc85e86f647188122ddfbac688a670474971720b3fb24da95adcc1",
        ],
    ),
}

tokens_lists = st.lists(st.integers(0, 2**32 - 1), max_size=40)
roots = st.binary(min_size=32, max_size=32).map(Key)
identifiers = st.text(max_size=8)
items_lists = st.lists(
    st.builds(Item, identifier=identifiers, start=st.integers(0, 40), length=st.integers(1, 12)),
    max_size=4,
)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_keys_of_a_known_prompt_never_change(name: str) -> None:
    """Every store out there is named by these bytes."""
    (lora_digest, cache_salt, items), expected_root, expected_keys = GOLDEN[name]

    root = root_key(FINGERPRINT, lora_digest=lora_digest, cache_salt=cache_salt)
    keys = block_keys(root, TOKENS, block_tokens=BLOCK_TOKENS, items=items, cache_salt=cache_salt)

    assert expected_root == root.hex()
    assert expected_keys == [key.hex() for key in keys]


def test_the_keys_of_known_tails_never_change_either() -> None:
    root = root_key(FINGERPRINT, lora_digest=None, cache_salt=None)
    (first, *_) = block_keys(root, TOKENS, block_tokens=BLOCK_TOKENS)
    image = Item("ab" * 16, BLOCK_TOKENS + 1, 1)
    short = tail_key(root, TOKENS[:1], block_tokens=BLOCK_TOKENS, first_token=0)
    long = tail_key(
        first,
        TOKENS[BLOCK_TOKENS : 2 * BLOCK_TOKENS - 1],
        block_tokens=BLOCK_TOKENS,
        first_token=BLOCK_TOKENS,
        items=[image],
    )

    assert short.hex() == "b5f5f4feddb6b8128a15754862cbc7720df779f01345249cb5a1d37bd91c9926"
    assert long.hex() == "10a202d0c8f371457b2ade7880211ca86345a90f389c7f2d630f89aa70f8167a"


@given(st.lists(st.integers(0, 2**32 - 1), min_size=BLOCK_TOKENS, max_size=BLOCK_TOKENS))
def test_no_tail_has_the_key_of_a_block_or_of_another_tail(tokens: list[int]) -> None:
    root = root_key(FINGERPRINT, lora_digest=None, cache_salt=None)
    tails = {
        bytes(tail_key(root, tokens[:n], block_tokens=BLOCK_TOKENS, first_token=0))
        for n in range(1, BLOCK_TOKENS)
    }
    assert len(tails | set(block_keys(root, tokens, block_tokens=BLOCK_TOKENS))) == BLOCK_TOKENS


def test_a_key_is_what_the_docstring_says() -> None:
    """The scheme written out by hand, field by field."""

    def field(value: bytes) -> bytes:
        return struct.pack("<I", len(value)) + value

    root = hashlib.sha256(
        field(b"ucm-key-1") + field(FINGERPRINT) + b"\x01" + field(LORA) + b"\x01" + field(b"salt")
    ).digest()
    tag = hashlib.sha256(field(b"ucm-salt-1") + field(b"salt")).digest()[:8]
    first = hashlib.sha256(
        root
        + struct.pack("<I4I", 4, 1, 2, 3, 4)
        + struct.pack("<I", 1)
        + field(b"cafe01")
        + struct.pack("<qQ", 2, 4)
    ).digest()
    first = first[:24] + tag
    second = hashlib.sha256(
        first
        + struct.pack("<I4I", 4, 0, 255, 65536, 4294967295)
        + struct.pack("<I", 2)
        + field(b"cafe01")
        + struct.pack("<qQ", -2, 4)
        + field(b"beef02")
        + struct.pack("<qQ", 3, 1)
    ).digest()
    second = second[:24] + tag

    actual_root = root_key(FINGERPRINT, lora_digest=LORA, cache_salt="salt")

    assert root == actual_root
    assert [first, second] == block_keys(
        actual_root, TOKENS[:8], block_tokens=BLOCK_TOKENS, items=IMAGES, cache_salt="salt"
    )


@given(st.text(max_size=5), st.text(max_size=5), st.integers(1, 3 * BLOCK_TOKENS))
def test_all_keys_of_a_salt_end_alike_and_no_key_of_another_does(
    mine: str, other: str, num_tokens: int
) -> None:
    def ends(cache_salt: str | None) -> set[bytes]:
        root = root_key(FINGERPRINT, lora_digest=None, cache_salt=cache_salt)
        keys = block_keys(
            root, TOKENS * 3, block_tokens=BLOCK_TOKENS, items=IMAGES, cache_salt=cache_salt
        )
        tail = tail_key(
            keys[0],
            TOKENS[: num_tokens % (BLOCK_TOKENS - 1) + 1],
            block_tokens=BLOCK_TOKENS,
            first_token=BLOCK_TOKENS,
            cache_salt=cache_salt,
        )
        assert {len(key) for key in [*keys, tail]} == {32}
        return {key[-8:] for key in [*keys, tail]}

    assert ends(mine) == {salt_tag(mine)}
    assert (ends(other) == ends(mine)) == (other == mine)
    assert len(ends(None)) > 1


@given(root=roots, shared=tokens_lists, a=tokens_lists, b=tokens_lists, items=items_lists)
def test_two_prompts_share_keys_exactly_as_far_as_they_share_a_prefix(
    root: Key, shared: list[int], a: list[int], b: list[int], items: list[Item]
) -> None:
    """A key names all tokens up to its block's end, and nothing behind it."""
    prompt_a, prompt_b = shared + a, shared + b
    keys_a = block_keys(root, prompt_a, block_tokens=BLOCK_TOKENS, items=items)
    keys_b = block_keys(root, prompt_b, block_tokens=BLOCK_TOKENS, items=items)

    for block, (key_a, key_b) in enumerate(zip(keys_a, keys_b, strict=False)):
        end = (block + 1) * BLOCK_TOKENS
        assert (prompt_a[:end] == prompt_b[:end]) == (key_a == key_b)


@given(root=roots, tokens=tokens_lists, block_tokens=st.integers(1, 9))
def test_only_full_blocks_have_a_key(root: Key, tokens: list[int], block_tokens: int) -> None:
    """A block that may still grow has no name yet."""
    keys = block_keys(root, tokens, block_tokens=block_tokens)

    assert len(tokens) // block_tokens == len(keys)
    assert all(len(key) == KEY_BYTES for key in keys)
    assert len(keys) == len(set(keys))


@given(root=roots, tokens=tokens_lists, items=items_lists, cut=st.integers(0, 10))
def test_a_prompt_can_be_continued_where_it_ended(
    root: Key, tokens: list[int], items: list[Item], cut: int
) -> None:
    """Keys of a growing prompt need no second look at what was named before."""
    whole = block_keys(root, tokens, block_tokens=BLOCK_TOKENS, items=items)
    head = whole[:cut]
    first_token = len(head) * BLOCK_TOKENS

    tail = block_keys(
        head[-1] if head else root,
        tokens[first_token:],
        block_tokens=BLOCK_TOKENS,
        items=items,
        first_token=first_token,
    )

    assert whole == head + tail


@given(items=items_lists)
def test_different_extras_never_spell_the_same_bytes(items: list[Item]) -> None:
    """The encoding of what overlaps a block can be read back, so it is injective."""
    extras = extras_by_block(items, block_tokens=1 << 20).get(0, [])

    assert extras == _decode_extras(encode_extras(extras))


def _decode_extras(data: bytes) -> list[Extra]:
    (count,), position = struct.unpack_from("<I", data), 4
    extras = []
    for _ in range(count):
        (length,) = struct.unpack_from("<I", data, position)
        content_hash = data[position + 4 : position + 4 + length]
        position += 4 + length
        extras.append(Extra(content_hash, *struct.unpack_from("<qQ", data, position)))
        position += 16
    assert position == len(data)
    return extras


@given(
    a=st.tuples(st.binary(max_size=9), st.none() | st.binary(max_size=9), st.none() | st.text()),
    b=st.tuples(st.binary(max_size=9), st.none() | st.binary(max_size=9), st.none() | st.text()),
)
def test_roots_are_equal_only_when_namespace_lora_and_salt_are(
    a: tuple[bytes, bytes | None, str | None], b: tuple[bytes, bytes | None, str | None]
) -> None:
    """None and empty are different, and no byte wanders from one field into the next."""
    root_a = root_key(a[0], lora_digest=a[1], cache_salt=a[2])
    root_b = root_key(b[0], lora_digest=b[1], cache_salt=b[2])

    assert (a == b) == (root_a == root_b)


@given(items=items_lists, block_tokens=st.integers(1, 9), num_blocks=st.integers(1, 60))
def test_an_item_is_in_exactly_the_blocks_that_it_overlaps(
    items: list[Item], block_tokens: int, num_blocks: int
) -> None:
    """Item [start, end) and block [b * n, (b + 1) * n) overlap when neither ends before the other
    starts; the offset counts from the block's start."""
    extras = extras_by_block(items, block_tokens=block_tokens)

    for block in range(num_blocks):
        first, end = block * block_tokens, (block + 1) * block_tokens
        expected = sorted(
            (item.start - first, item.length, item.identifier.encode())
            for item in items
            if item.start < end and item.start + item.length > first
        )
        assert expected == sorted(
            (extra.offset, extra.length, extra.content_hash) for extra in extras.get(block, [])
        )


@pytest.mark.parametrize(
    ("item", "expected_blocks"),
    [
        (Item("i", 0, 4), {0}),
        (Item("i", 3, 1), {0}),
        (Item("i", 4, 1), {1}),
        (Item("i", 3, 2), {0, 1}),
        (Item("i", 2, 9), {0, 1, 2}),
        (Item("i", 4, 0), set()),
    ],
)
def test_the_borders_of_items_and_blocks(item: Item, expected_blocks: set[int]) -> None:
    """The last token of a block, the first of the next, and an item over three blocks."""
    assert expected_blocks == set(extras_by_block([item], block_tokens=4))


@given(items=items_lists)
def test_the_order_in_which_items_are_listed_does_not_matter(items: list[Item]) -> None:
    """Two frontends may list the images of one prompt in different orders."""
    root = root_key(FINGERPRINT, lora_digest=None, cache_salt=None)
    tokens = list(range(40))

    expected = block_keys(root, tokens, block_tokens=4, items=items)

    assert expected == block_keys(root, tokens, block_tokens=4, items=items[::-1])


def test_moving_an_image_by_one_token_changes_the_keys_from_its_block_on() -> None:
    """The same tokens with an item elsewhere have another KV."""
    root = root_key(FINGERPRINT, lora_digest=None, cache_salt=None)
    here = block_keys(root, TOKENS, block_tokens=4, items=[Item("cafe01", 5, 3)])
    there = block_keys(root, TOKENS, block_tokens=4, items=[Item("cafe01", 6, 3)])

    assert here[0] == there[0]
    assert here[1] != there[1]
    assert here[2] != there[2]


def test_a_token_that_is_no_token_is_refused() -> None:
    """A wrapped number would name another prompt."""
    root = root_key(FINGERPRINT, lora_digest=None, cache_salt=None)
    for token in (-1, 1 << 32):
        with pytest.raises(OverflowError):
            block_keys(root, [token] * 4, block_tokens=4)


def test_a_salt_that_is_not_unicode_still_names_something() -> None:
    """JSON may spell half of a surrogate pair; the engine's step must not raise."""
    half = root_key(FINGERPRINT, lora_digest=None, cache_salt="\ud800")
    other_half = root_key(FINGERPRINT, lora_digest=None, cache_salt="\udc00")

    assert half != other_half
