"""Which namespace a rank of SGLang is in, and what its pages look like.

A page of the store is a page of the host pool as it lies there, in the order of its buffers: bytes
of one layout, one pool and one rank's heads and layers. So all of these are in the namespace, and
ranks share with their like only; where the same KV is on every rank (MLA), it has no rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from ucm.config.settings import Settings
from ucm.errors import UnsupportedEngine
from ucm.integration.sglang.served_model import ModelIdentity, ServedModel, is_rocm, model_identity
from ucm.store.blocks.namespace import Manifest

LAYOUTS: Final = (
    *("layer_first", "page_first", "page_first_direct", "page_head", "page_first_kv_split"),
)
# What else there is to know of a pool's geometry; which of it there is depends on the model.
_GEOMETRY: Final = (
    *("head_num", "head_dim", "v_head_dim", "kv_lora_rank", "qk_rope_head_dim", "kv_cache_dim"),
    *("start_layer", "end_layer"),
)


@dataclass(frozen=True)
class HostPage:
    """One page of a rank's host pool: the sizes of its buffers, and what names its bytes."""

    buffer_sizes: tuple[int, ...]
    page_tokens: int
    identity: ModelIdentity
    layout: str
    facts: dict[str, object]
    num_layers: int
    epoch: int

    @property
    def num_shards(self) -> int:
        return 1

    @property
    def shard_bytes(self) -> int:
        return self.page_bytes

    @property
    def page_bytes(self) -> int:
        return sum(self.buffer_sizes)

    def in_epoch(self, epoch: int) -> HostPage:
        return replace(self, epoch=epoch)

    def manifest(self) -> Manifest:
        """Never that of another engine: keys are SGLang's hashes, and mean nothing elsewhere."""
        return Manifest(
            block_tokens=self.page_tokens,
            model_dtype=self.identity.model_dtype,
            kv_dtype=self.identity.kv_dtype,
            kv_scales=self.identity.kv_scales,
            num_layers=self.num_layers,
            num_kv_heads=1,
            k_size=self.page_bytes,
            v_size=0,
            layout=f"opaque:sglang:{self.layout}",
            weights=self.identity.weights,
            quantization=self.identity.quantization,
            model_shape={**self.identity.shape, "sglang": self.facts},
            epoch=self.epoch,
        )


def host_page(
    storage_config: Any, pool: Any, settings: Settings, *, served: ServedModel | None, epoch: int
) -> HostPage:
    """`storage_config` is SGLang's HiCacheStorageConfig, `pool` its HostKVCache. Reads the model's
    folder. Raises UnsupportedEngine for what can't be named."""
    _refuse(storage_config, pool)
    item_bytes = int(pool.dtype.itemsize)
    identity = model_identity(
        served,
        settings,
        pool_dtype=str(pool.dtype).removeprefix("torch."),
        item_bytes=item_bytes,
    )
    if int(pool.layer_num) != int(pool.target_layer_num) and settings.model_id is None:
        raise UnsupportedEngine(
            "the pages hold layers of a draft model as well, whose weights have no name in the "
            "store: set model_id to a text that names both models, or leave out the draft"
        )
    return HostPage(
        buffer_sizes=_buffer_sizes(pool),
        page_tokens=int(pool.page_size),
        identity=identity,
        layout=str(pool.layout),
        facts=_facts(storage_config, pool),
        num_layers=int(pool.layer_num),
        epoch=epoch,
    )


def _refuse(config: Any, pool: Any) -> None:
    kind = type(pool).__name__
    if getattr(config, "should_split_heads", False):
        raise UnsupportedEngine(
            "tp_lcm_size splits pages by heads, which the store has no names for: leave it out, "
            "and give prefill and decode the same --tp-size"
        )
    if int(getattr(config, "dcp_size", 1)) > 1:
        raise UnsupportedEngine("pages that are divided by decode context parallelism: not tried")
    lacking = [
        name
        for name in ("dtype", "page_size", "layout", "layer_num", "target_layer_num")
        if getattr(pool, name, None) is None
    ]
    if lacking or not hasattr(pool, "get_page_buffer_meta"):
        raise UnsupportedEngine(
            f"SGLang's {kind} doesn't say its {', '.join(lacking) or 'pages'}: this version is not "
            f"one that was read (docs/sglang.md)"
        )
    if pool.layout not in LAYOUTS:
        raise UnsupportedEngine(
            f"--hicache-mem-layout {pool.layout}: the order of its bytes has no name in the store: "
            f"use page_first"
        )


def _facts(config: Any, pool: Any) -> dict[str, object]:
    """All values are JSON. `rank` is left out where every rank has the same pages."""
    is_mla = bool(config.is_mla_model)
    ranks = (
        "mla" if is_mla else f"tp {int(config.tp_rank)} of {int(config.tp_size)}",
        f"pp {int(config.pp_rank)} of {int(config.pp_size)}",
        f"cp {int(config.attn_cp_rank)} of {int(config.attn_cp_size)}",
    )
    geometry = {name: getattr(pool, name, None) for name in _GEOMETRY}
    return {
        "pool": type(pool).__name__,
        "format": str(getattr(pool, "storage_format_tag", None) or "plain"),
        "rank": ", ".join(ranks),
        "geometry": {name: int(value) for name, value in geometry.items() if value is not None},
        "device": _device(pool),
    }


def _device(pool: Any) -> dict[str, object]:
    """How a token's rows lie in the device's tensors, of which the host's are copies: kernels of
    some platforms want them in an order of their own."""
    for name in ("device_k_buffers", "device_kv_buffers"):
        tensors = getattr(pool, name, None)
        if tensors is not None:
            break
    else:
        raise UnsupportedEngine(
            f"SGLang's {type(pool).__name__} doesn't say how its device's tensors lie: this "
            f"version is not one that was read (docs/sglang.md)"
        )
    if not tensors:  # split over two pools of their own, which the layout says
        return {"platform": "split", "row": []}
    first = tensors[0]
    platform = "rocm" if is_rocm() else str(first.device.type)
    return {"platform": platform, "row": [int(size) for size in first.shape[1:]]}


def _buffer_sizes(pool: Any) -> tuple[int, ...]:
    """Of the first page, as of all others: SGLang gives them for any indices."""
    try:
        meta = pool.get_page_buffer_meta(np.arange(int(pool.page_size)))
    except Exception as error:
        raise UnsupportedEngine(
            f"SGLang's {type(pool).__name__} has no pages for a storage backend ({error})"
        ) from error
    sizes = tuple(int(size) for size in meta[1]) if meta else ()
    if not sum(sizes):
        raise UnsupportedEngine(
            f"SGLang's {type(pool).__name__} holds no KV itself: models of this kind are not served"
        )
    return sizes
