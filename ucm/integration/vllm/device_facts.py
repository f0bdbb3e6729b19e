"""What device copies need to know about the engine, read from vLLM's objects in one place."""

from __future__ import annotations

from typing import Any

from ucm.config.settings import Settings
from ucm.errors import UnsupportedEngine
from ucm.integration.ascend.engine import keeps_its_layout
from ucm.integration.copies.device import DIRECT_RUN_BYTES
from ucm.integration.vllm.engine_versions import head_major_layout


def refuse_layerwise_with_micro_batches(parallel: Any, settings: Settings) -> None:
    """Each micro-batch runs every layer by itself, and on its own thread: after the first has run a
    layer, the blocks of the others lack it."""
    if settings.use_layerwise and parallel.use_ubatching:
        raise UnsupportedEngine(
            "use_layerwise copies a layer when it has run, and this engine runs each layer once "
            "per micro-batch (--enable-dbo or --ubatch-size): leave out one of the two"
        )


def can_sleep(model: Any) -> bool:
    """Whether vLLM may take the KV cache's memory away while the engine lives."""
    return bool(model.enable_sleep_mode)


def wanted_layout(vllm_config: Any, settings: Settings) -> str | None:
    """The KV cache layout to ask vLLM for; None leaves it to vLLM."""
    from vllm.platforms import current_platform

    device = current_platform.device_type
    if device == "cpu" or keeps_its_layout(device) or settings.engine_layout == "keep":
        return None
    if settings.engine_layout == "head_major":
        return head_major_layout(vllm_config)
    model, cache = vllm_config.model_config, vllm_config.cache_config
    if cache.block_size is None or model.use_mla:
        return None
    pays = head_major_pays(
        engine_block_tokens=int(cache.block_size),
        block_tokens=settings.block_tokens,
        num_heads=int(model.get_num_kv_heads(vllm_config.parallel_config)),
        token_bytes=2 * int(model.get_head_size()) * _item_bytes(model, cache),
    )
    return head_major_layout(vllm_config) if pays else None


def head_major_pays(
    *, engine_block_tokens: int, block_tokens: int, num_heads: int, token_bytes: int
) -> bool:
    """Whether the blocks of a head-major cache and the pages have runs in common that are worth a
    transfer each. `token_bytes` are those of one head. A whole page's heads are one run, of a part
    of a page each head is one."""
    heads = num_heads if engine_block_tokens == block_tokens else 1
    return heads * engine_block_tokens * token_bytes >= DIRECT_RUN_BYTES


def _item_bytes(model: Any, cache: Any) -> int:
    if str(cache.cache_dtype) == "auto":
        return int(model.dtype.itemsize)
    return 1 if str(cache.cache_dtype).startswith(("fp8", "int8")) else 2
