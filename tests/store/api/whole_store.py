"""A store over a node cache of its own, and blocks whose contents follow from their names."""

from __future__ import annotations

from hashlib import shake_128
from typing import Any

from tests.store.node.support import SOON_S, Engine, Place
from ucm.store.pipeline import UcmPipelineStore

SIZES = (12_000, 101)
NUM_SHARDS = 4
IDS = [f"block {i}".encode() for i in range(40)]


def open_store(place: Place, **changes: Any) -> UcmPipelineStore:
    config: dict[str, object] = {
        "store_pipeline": "Cache|Posix",
        "storage_backends": str(place.store),
        "cache_buffer_capacity_gb": 1 / 32,
        "min_free_gb": 0,
        "node_cache_socket": place.settings().socket_path,
        "tensor_size_list": list(SIZES),
        "shard_size": sum(SIZES),
        "block_size": NUM_SHARDS * sum(SIZES),
        "timeout_ms": int(SOON_S * 1000),
    }
    return UcmPipelineStore(
        {name: value for name, value in {**config, **changes}.items() if value is not None}
    )


def whole_blocks(place: Place, **changes: Any) -> UcmPipelineStore:
    """A store whose blocks have one shard."""
    return open_store(place, block_size=None, shard_size=None, **changes)


def row_of(block_id: bytes, shard: int = 0) -> list[bytes]:
    return [shake_128(block_id + bytes([shard])).digest(size) for size in SIZES]


def rows(ids: list[bytes], shard: int = 0) -> list[list[bytes]]:
    return [row_of(block_id, shard) for block_id in ids]


def dump(store: UcmPipelineStore, ids: list[bytes], shard: int = 0) -> None:
    store.wait(store.dump_data(ids, [shard] * len(ids), rows(ids, shard)))


def dump_all_shards(store: UcmPipelineStore, ids: list[bytes]) -> None:
    for shard in range(NUM_SHARDS):
        dump(store, ids, shard)


def load(store: UcmPipelineStore, ids: list[bytes], shard: int = 0) -> list[list[bytes]]:
    loaded = [[bytearray(size) for size in SIZES] for _ in ids]
    store.wait(store.load_data(ids, [shard] * len(ids), loaded))
    return [[bytes(each) for each in row] for row in loaded]


def status_of(place: Place, **changes: Any) -> Any:
    with Engine(place.settings(**changes), session="watch", role="tool") as watch:
        return watch.status()
