"""SGLang's side of the door, recorded from 0.5.23: these tests run where it isn't installed.

What is here is what SGLang calls, and with what: the signatures of HiCacheStorage, what a rank is
told, host pools as far as a storage backend sees them, and what the cache controller does in which
order (its modules srt.mem_cache.hicache_storage, srt.mem_cache.pool_host and
srt.managers.cache_controller). test_sglang_interface.py compares it with SGLang where there is one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

VERSION = "0.5.23"
STORAGE_BATCH_SIZE = 128

# Methods of HiCacheStorage that SGLang calls, and their parameters after self.
SIGNATURES: dict[str, list[str]] = {
    "register_mem_pool_host": ["mem_pool_host"],
    "register_mem_host_pool_v2": ["host_pool", "host_pool_name"],
    "batch_get_v2": ["transfers", "extra_info"],
    "batch_set_v2": ["transfers", "extra_info"],
    "batch_get_v1": ["keys", "host_indices", "extra_info"],
    "batch_set_v1": ["keys", "host_indices", "extra_info"],
    "get": ["key", "target_location", "target_sizes"],
    "batch_get": ["keys", "target_locations", "target_sizes"],
    "set": ["key", "value", "target_location", "target_sizes"],
    "batch_set": ["keys", "values", "target_locations", "target_sizes"],
    "exists": ["key"],
    "batch_exists": ["keys", "extra_info"],
    "clear": [],
    "get_stats": [],
}


@dataclass
class StorageConfig:
    """HiCacheStorageConfig."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    attn_cp_rank: int = 0
    attn_cp_size: int = 1
    is_mla_model: bool = False
    enable_storage_metrics: bool = False
    is_page_first_layout: bool = True
    model_name: str | None = "served-name"
    tp_lcm_size: int | None = None
    should_split_heads: bool = False
    dp_rank: int = 0
    extra_config: dict[str, Any] | None = None
    dcp_size: int = 1
    dcp_rank: int = 0
    logical_page_size: int | None = None

    @property
    def is_storage_writer(self) -> bool:
        return not self.is_mla_model or self.tp_rank == self.dcp_rank


@dataclass
class ExtraInfo:
    """HiCacheStorageExtraInfo."""

    prefix_keys: list[str] | None = None
    extra_info: dict[str, Any] | None = None


class Dtype:
    def __init__(self, name: str, itemsize: int) -> None:
        self.itemsize = itemsize
        self._name = name

    def __str__(self) -> str:
        return f"torch.{self._name}"


@dataclass
class DeviceTensor:
    shape: tuple[int, ...]
    device: Any = field(default_factory=lambda: DeviceOf("cuda"))


@dataclass
class DeviceOf:
    type: str


BFLOAT16 = Dtype("bfloat16", 2)


class HostKVCache:
    """What both of SGLang's pools have."""

    storage_format_tag: str | None = None

    def __init__(
        self, *, layout: str, num_pages: int, page_size: int, layer_num: int, token_bytes: int
    ) -> None:
        self.layout = layout
        self.page_size = page_size
        self.layer_num = self.target_layer_num = layer_num
        self.start_layer, self.end_layer = 0, layer_num
        self.dtype = BFLOAT16
        self.size = num_pages * page_size
        self.kv_buffer = np.zeros(self.size * token_bytes, dtype=np.uint8)

    def page(self, number: int) -> bytes:
        """The bytes of a page, in the order of its buffers."""
        addresses, sizes = self.get_page_buffer_meta(self.indices([number]))
        base = self.kv_buffer.ctypes.data
        return b"".join(
            self.kv_buffer[address - base : address - base + size].tobytes()
            for address, size in zip(addresses, sizes, strict=True)
        )

    def fill(self, number: int, content: bytes) -> None:
        addresses, sizes = self.get_page_buffer_meta(self.indices([number]))
        base = self.kv_buffer.ctypes.data
        for address, size in zip(addresses, sizes, strict=True):
            part, content = content[:size], content[size:]
            self.kv_buffer[address - base : address - base + size] = list(part)

    def indices(self, pages: Sequence[int]) -> np.ndarray:
        """Of all tokens of these pages, as the pool's allocator gives them."""
        return np.concatenate(
            [np.arange(page * self.page_size, (page + 1) * self.page_size) for page in pages]
        )

    def get_page_buffer_meta(self, indices: np.ndarray) -> tuple[list[int], list[int]]:
        raise NotImplementedError


class MHATokenToKVPoolHost(HostKVCache):
    def __init__(
        self,
        layout: str = "page_first",
        *,
        num_pages: int = 8,
        page_size: int = 16,
        layer_num: int = 3,
        head_num: int = 2,
        head_dim: int = 8,
    ) -> None:
        self.head_num, self.head_dim, self.v_head_dim = head_num, head_dim, head_dim
        self._row_bytes = head_num * head_dim * BFLOAT16.itemsize
        super().__init__(
            layout=layout,
            num_pages=num_pages,
            page_size=page_size,
            layer_num=layer_num,
            token_bytes=2 * layer_num * self._row_bytes,
        )
        rows = DeviceTensor((1024, head_num, head_dim))
        self.device_k_buffers = self.device_v_buffers = (rows,) * layer_num

    def get_page_buffer_meta(self, indices: np.ndarray) -> tuple[list[int], list[int]]:
        assert len(indices) % self.page_size == 0
        addresses: list[int] = []
        base = self.kv_buffer.ctypes.data
        v_offset = self.layer_num * self.size * self._row_bytes
        for index in indices.tolist()[:: self.page_size]:
            if self.layout == "layer_first":
                for layer in range(self.layer_num):
                    k = base + (index + layer * self.size) * self._row_bytes
                    addresses += [k, k + v_offset]
            elif self.layout in ("page_first", "page_first_direct", "page_head"):
                k = base + index * self.layer_num * self._row_bytes
                addresses += [k, k + v_offset]
            else:
                raise ValueError(f"Unsupported layout: {self.layout}")
        layers = 1 if self.layout == "layer_first" else self.layer_num
        return addresses, [layers * self.page_size * self._row_bytes] * len(addresses)


class MLATokenToKVPoolHost(HostKVCache):
    def __init__(self, layout: str = "page_first", *, num_pages: int = 8) -> None:
        self.kv_lora_rank, self.qk_rope_head_dim, self.kv_cache_dim = 24, 8, 32
        self._row_bytes = self.kv_cache_dim * BFLOAT16.itemsize
        super().__init__(
            layout=layout,
            num_pages=num_pages,
            page_size=16,
            layer_num=3,
            token_bytes=3 * self._row_bytes,
        )
        self.device_kv_buffers = (DeviceTensor((1024, 1, self.kv_cache_dim)),) * self.layer_num

    def get_page_buffer_meta(self, indices: np.ndarray) -> tuple[list[int], list[int]]:
        assert len(indices) % self.page_size == 0
        addresses: list[int] = []
        base = self.kv_buffer.ctypes.data
        for index in indices.tolist()[:: self.page_size]:
            if self.layout == "layer_first":
                addresses += [
                    base + (index + layer * self.size) * self._row_bytes
                    for layer in range(self.layer_num)
                ]
            else:
                addresses.append(base + index * self.layer_num * self._row_bytes)
        layers = 1 if self.layout == "layer_first" else self.layer_num
        return addresses, [layers * self.page_size * self._row_bytes] * len(addresses)


def page_hashes(name: str, num_pages: int) -> list[str]:
    """A chain, as SGLang makes it of the tokens of a prompt."""
    hashes: list[str] = []
    for number in range(num_pages):
        above = bytes.fromhex(hashes[-1]) if hashes else b""
        hashes.append(hashlib.sha256(above + f"{name} {number}".encode()).hexdigest())
    return hashes


class CacheController:
    """The calls of HiCacheController, of one rank, without its queues and collectives."""

    def __init__(self, backend: Any, config: StorageConfig, pool: HostKVCache) -> None:
        """As attach_storage_backend does when the factory has made `backend`, and a controller with
        several pools after that."""
        self.backend, self.config, self.pool = backend, config, pool
        backend.register_mem_pool_host(pool)
        backend.register_mem_host_pool_v2(pool, "kv")
        backend.on_host_pools_registered()

    def backup(self, hashes: list[str], pages: Sequence[int]) -> int:
        """_page_backup: pages of the host pool into storage. Returns how many were."""
        if not self.config.is_storage_writer:
            return 0
        done = 0
        for start in range(0, len(hashes), STORAGE_BATCH_SIZE):
            batch = hashes[start : start + STORAGE_BATCH_SIZE]
            indices = self.pool.indices(pages[start : start + len(batch)])
            if not all(self.backend.batch_set_v1(batch, indices, ExtraInfo())):
                break
            done += len(batch)
        return done

    def query(self, hashes: list[str]) -> int:
        """_storage_hit_query."""
        hits = 0
        for start in range(0, len(hashes), STORAGE_BATCH_SIZE):
            batch = hashes[start : start + STORAGE_BATCH_SIZE]
            found = self.backend.batch_exists(batch, ExtraInfo())
            hits += found
            if found < len(batch):
                break
        return hits

    def prefetch(self, hashes: list[str], pages: Sequence[int]) -> int:
        """_page_transfer: storage into pages of the host pool. Returns how many leading ones."""
        done = 0
        for start in range(0, len(hashes), STORAGE_BATCH_SIZE):
            batch = hashes[start : start + STORAGE_BATCH_SIZE]
            indices = self.pool.indices(pages[start : start + len(batch)])
            results = self.backend.batch_get_v1(batch, indices, ExtraInfo())
            hits = [*results, False].index(False)
            done += hits
            if hits < len(batch):
                break
        return done
