"""A block as users of the store API see it: shards of tensors, packed into one page.

    page   [ shard 0 | shard 1 | ... ]        one file, one slot, visible as a whole or not at all
    shard  [ tensor 0 | tensor 1 | ... ]      `tensor_sizes` bytes each, without gaps

An engine that goes layer by layer makes one shard per layer. UCM's own names for these numbers are
kept: `tensor_size` or `tensor_size_list` for the tensors of a shard, `shard_size` and `block_size`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from ucm.errors import ConfigError
from ucm.store.blocks import namespace
from ucm.store.blocks.keys import Key

# What UcmPipelineStore reads of its configuration beside the settings of the store.
SHARD_KEYS: Final = frozenset(
    {"tensor_size", "tensor_size_list", "shard_size", "block_size", "unique_id"}
)

_KEY_FORMAT: Final = b"ucm-store-key-1"
_DEFAULT_ID: Final = "default"
_SOURCE: Final = "UcmPipelineStore"


@dataclass(frozen=True)
class BlockShape:
    """Sizes in bytes. `unique_id` keeps apart what must not share blocks though the sizes agree."""

    tensor_sizes: tuple[int, ...]
    num_shards: int
    unique_id: str

    @property
    def shard_bytes(self) -> int:
        return sum(self.tensor_sizes)

    @property
    def page_bytes(self) -> int:
        return self.num_shards * self.shard_bytes

    def manifest(self) -> namespace.Manifest:
        """Block ids only mean something to who made them, so these blocks are shared by equal
        `unique_id` and sizes, and never with an engine that makes its keys from tokens."""
        return namespace.Manifest(
            block_tokens=1,
            model_dtype="bytes",
            kv_dtype="bytes",
            kv_scales="none",
            num_layers=self.num_shards,
            num_kv_heads=1,
            k_size=self.shard_bytes,
            v_size=0,
            layout="opaque:shards of the store API",
            weights=f"unique_id:{self.unique_id}",
            model_shape={"tensor_sizes": list(self.tensor_sizes)},
            epoch=0,
        )


class BlockNames:
    """From block ids, which are any bytes, to keys, which are one namespace's."""

    def __init__(self, fingerprint: bytes) -> None:
        self._start = sha256(_KEY_FORMAT + fingerprint)

    def key(self, block_id: bytes) -> Key:
        """SHA256("ucm-store-key-1" fingerprint block_id): both fields before the id have a fixed
        length, so no two ids spell the same bytes."""
        digest = self._start.copy()
        digest.update(block_id)
        return Key(digest.digest())


def block_shape(config: Mapping[str, object]) -> BlockShape:
    """The shape in a configuration for UcmPipelineStore. Raises ConfigError."""
    shard_size = _size(config, "shard_size")
    tensor_sizes = _tensor_sizes(config, shard_size)
    shard_bytes = sum(tensor_sizes)
    # UCM lets a shard be larger than its tensors, rounded up to what O_DIRECT takes: here the page
    # is padded once, at its end.
    shard_size = shard_size or shard_bytes
    if shard_size < shard_bytes:
        raise _wrong("shard_size", f"{shard_size} bytes can't hold tensors of {shard_bytes}")
    block_size = _size(config, "block_size") or shard_size
    if block_size % shard_size:
        raise _wrong("block_size", f"{block_size} is not a multiple of shard_size {shard_size}")
    unique_id = config.get("unique_id", _DEFAULT_ID)
    if not isinstance(unique_id, str) or not unique_id:
        raise _wrong("unique_id", f"expected text, got {unique_id!r}")
    return BlockShape(
        tensor_sizes=tensor_sizes, num_shards=block_size // shard_size, unique_id=unique_id
    )


def _tensor_sizes(config: Mapping[str, object], shard_size: int | None) -> tuple[int, ...]:
    sizes = config.get("tensor_size_list")
    if sizes is not None:
        if not isinstance(sizes, (list, tuple)) or not sizes or not all(map(_is_size, sizes)):
            raise _wrong("tensor_size_list", f"expected sizes in bytes, got {sizes!r}")
        return tuple(sizes)
    tensor_size = _size(config, "tensor_size")
    if tensor_size is None:
        if shard_size is None:
            raise _wrong(
                "tensor_size_list",
                "missing: expected the size in bytes of each tensor of a shard; every user of a "
                "store needs it, also one that only looks up",
            )
        return (shard_size,)
    if shard_size is not None and shard_size % tensor_size:
        raise _wrong("shard_size", f"{shard_size} is not a multiple of tensor_size {tensor_size}")
    return (tensor_size,) * ((shard_size or tensor_size) // tensor_size)


def _size(config: Mapping[str, object], name: str) -> int | None:
    value = config.get(name)
    if value is None:
        return None
    if not _is_size(value):
        raise _wrong(name, f"expected a size in bytes > 0, got {value!r}")
    assert isinstance(value, int)
    return value


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _wrong(name: str, what: str) -> ConfigError:
    return ConfigError(f"{_SOURCE}: {name}: {what}")
