from __future__ import annotations

import pytest

from ucm.errors import ConfigError
from ucm.store.api.shards import BlockNames, BlockShape, block_shape
from ucm.store.blocks import namespace


@pytest.mark.parametrize(
    ("config", "tensor_sizes", "num_shards"),
    [
        ({"tensor_size_list": [100, 28]}, (100, 28), 1),
        ({"tensor_size_list": [100, 28], "block_size": 1280}, (100, 28), 10),
        ({"tensor_size_list": [100, 28], "shard_size": 128, "block_size": 1280}, (100, 28), 10),
        ({"tensor_size": 64}, (64,), 1),
        ({"tensor_size": 64, "shard_size": 256, "block_size": 512}, (64,) * 4, 2),
        ({"shard_size": 256}, (256,), 1),
        ({"tensor_size_list": [100], "shard_size": 4096, "block_size": 8192}, (100,), 2),
    ],
)
def test_the_sizes_of_ucm_say_how_a_block_is_made(
    config: dict[str, object], tensor_sizes: tuple[int, ...], num_shards: int
) -> None:
    shape = block_shape(config)

    assert tensor_sizes == shape.tensor_sizes
    assert num_shards == shape.num_shards
    assert shape.page_bytes == shape.num_shards * sum(shape.tensor_sizes)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "tensor_size_list: missing"),
        ({"block_size": 4096}, "tensor_size_list: missing"),
        ({"tensor_size_list": []}, "tensor_size_list: expected sizes in bytes"),
        ({"tensor_size_list": [4096, 0]}, "tensor_size_list: expected sizes in bytes"),
        ({"tensor_size_list": "4096"}, "tensor_size_list: expected sizes in bytes"),
        ({"tensor_size": True}, "tensor_size: expected a size in bytes > 0"),
        ({"tensor_size": 100, "shard_size": 256}, "shard_size: 256 is not a multiple"),
        ({"tensor_size_list": [200, 200], "shard_size": 256}, "shard_size: 256 bytes can't hold"),
        ({"tensor_size": 128, "block_size": 200}, "block_size: 200 is not a multiple"),
        ({"tensor_size": 128, "unique_id": ""}, "unique_id: expected text"),
    ],
)
def test_sizes_that_make_no_block_are_refused_in_one_line(
    config: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        block_shape(config)

    assert str(raised.value).startswith("UcmPipelineStore: ")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_stores_share_a_namespace_exactly_when_their_ids_and_sizes_agree() -> None:
    """Also the split of a page into tensors and shards: it says where a tensor's bytes are."""
    shapes = [
        BlockShape((64, 64), 2, "a"),
        BlockShape((64, 64), 2, "b"),
        BlockShape((128,), 2, "a"),
        BlockShape((64, 64, 64, 64), 1, "a"),
    ]

    fingerprints = [namespace.fingerprint(shape.manifest()) for shape in shapes]

    assert len({shape.page_bytes for shape in shapes}) == 1
    assert len(set(fingerprints)) == len(shapes)
    assert fingerprints[0] == namespace.fingerprint(BlockShape((64, 64), 2, "a").manifest())


def test_the_difference_of_two_stores_can_be_read() -> None:
    ours, theirs = BlockShape((64,), 2, "a").manifest(), BlockShape((64,), 4, "b").manifest()

    assert namespace.differences(theirs, ours) == [
        "num_layers: 4 (there) / 2 (here)",
        "weights: unique_id:b (there) / unique_id:a (here)",
    ]


def test_block_names_have_golden_keys() -> None:
    """Files outlive versions: a change here is a new key format."""
    names = BlockNames(bytes(range(32)))

    assert names.key(b"block 1").hex() == (
        "4332aef8d5d4b54e36e1513514af4e7611ca075af7e95bc574bcd26a790e8689"
    )
    assert names.key(b"").hex() == (
        "52b5d5e8d8b55b0a5e8d141c25b43ec52c655ccbf79777bc390ad390ed252fbc"
    )


def test_a_block_id_names_another_block_in_another_namespace() -> None:
    assert BlockNames(b"a" * 32).key(b"x") != BlockNames(b"b" * 32).key(b"x")
    assert len(BlockNames(b"a" * 32).key(b"x" * 1000)) == 32
