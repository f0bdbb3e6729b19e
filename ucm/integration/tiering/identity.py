"""Which namespace the rows of an engine's offloading are in, and which engines have none.

A row is what kernels have written, all ranks side by side, under vLLM's own hash. So beside what
shapes the numbers everything is named that shapes their order: the version, the device, the
kernels, the ranks, the layers of each group. What vLLM's hash leaves out is refused: the files of
an adapter, and pictures that are called what their sender calls them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ucm.config.settings import Settings
from ucm.errors import UnsupportedEngine
from ucm.integration.tiering.promises import WaitedGroup
from ucm.integration.vllm.engine_facts import why_no_hits
from ucm.integration.vllm.identity import manifest_without_strands
from ucm.integration.vllm.strand_layout import order_inside_blocks
from ucm.store.blocks.namespace import MANIFEST_FORMAT, Manifest

if TYPE_CHECKING:
    from ucm.integration.tiering.engine import Engine

_LAYOUT: Final = "opaque:rows of vLLM's tiering"
_HASHES: Final = ("sha256", "sha256_cbor")


def row_manifest(
    engine: Engine,
    spec: Any,
    settings: Settings,
    *,
    row_bytes: int,
    block_tokens: int,
    epoch: int,
) -> Manifest:
    """`spec` is vLLM's OffloadingSpec. Raises UnsupportedEngine."""
    vllm_config = engine.vllm_config
    _refuse(vllm_config)
    computed = manifest_without_strands(vllm_config, settings, epoch=epoch)
    return msgspec.structs.replace(
        computed,
        format_version=MANIFEST_FORMAT,
        block_tokens=block_tokens,
        num_layers=1,
        num_kv_heads=1,
        k_size=row_bytes,
        layout=_LAYOUT,
        strands=msgspec.UNSET,
        model_shape={**computed.model_shape, "tiering": _rows(engine, spec)},
    )


def _refuse(vllm_config: Any) -> None:
    if vllm_config.lora_config is not None:
        raise UnsupportedEngine(
            "vLLM's offloading names an adapter by its name and path, whatever is in its files: "
            "use UCMConnector for an engine with --enable-lora"
        )
    pictures = getattr(vllm_config.model_config, "multimodal_config", None)
    if pictures is not None and not pictures.language_model_only:
        raise UnsupportedEngine(
            "vLLM's offloading names pictures by what their sender calls them: use UCMConnector, "
            "or --language-model-only if this engine is sent text alone"
        )
    algorithm = str(vllm_config.cache_config.prefix_caching_hash_algo)
    if algorithm not in _HASHES:
        raise UnsupportedEngine(
            f"--prefix-caching-hash-algo {algorithm}: two prompts could have one name in a store "
            f"that many share; use one of {', '.join(_HASHES)}"
        )
    if why := why_no_hits(vllm_config):
        raise UnsupportedEngine(f"this engine could not use what is stored: {why}")


def _rows(engine: Engine, spec: Any) -> dict[str, object]:
    import vllm

    config, vllm_config = spec.config, engine.vllm_config
    parallel = config.parallel
    return {
        "vllm": str(vllm.__version__),
        "device": _device(),
        "kernels": str(vllm_config.attention_config),
        "runner": "v2" if vllm_config.use_v2_model_runner else "v1",
        "layout": str(config.kv_cache_layout),
        "canonical": bool(config.canonical_layout),
        "one_copy": bool(spec.replicated_layout),
        "blocks_per_chunk": int(spec.blocks_per_chunk),
        "tokens_per_hash": int(spec.tokens_per_hash),
        "hash": _hash(str(vllm_config.cache_config.prefix_caching_hash_algo)),
        "ranks": {
            name: int(getattr(parallel, name))
            for name in ("world_size", "tp_size", "pp_size", "pcp_size", "dcp_size")
        },
        "groups": [_group(engine, group) for group in config.groups],
    }


def _group(engine: Engine, group: Any) -> dict[str, object]:
    kv_spec = engine.kv_cache_config.kv_cache_groups[group.group_id].kv_cache_spec
    return {
        "number": int(group.group_id),
        "block_tokens": int(group.tokens_per_block),
        "layers": list(group.layer_names),
        "cache": str(kv_spec),
        "order": order_inside_blocks(engine.vllm_config, kv_spec),
    }


def _device() -> str:
    """Kernels are chosen by it."""
    from vllm.platforms import current_platform

    if current_platform.device_type == "cpu":
        return f"cpu {current_platform.get_cpu_architecture().name}"
    return f"{current_platform.device_type} {current_platform.get_device_name()}"


def _hash(algorithm: str) -> dict[str, str]:
    """With another seed all names are others: nothing is shared, and a look at the manifests says
    why."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed

    seed = resolve_none_hash_seed(get_hash_fn_by_name(algorithm))
    return {"algorithm": algorithm, "seed": str(seed)}


def waited_group(engine: Engine, spec: Any) -> WaitedGroup:
    """The group of which most is kept, of several the first."""
    groups = spec.config.groups
    reaches = [
        _reach(engine.kv_cache_config.kv_cache_groups[group.group_id].kv_cache_spec)
        for group in groups
    ]
    most = max(reaches)
    group = groups[reaches.index(most)]
    return WaitedGroup(
        number=int(group.group_id),
        chunk_tokens=int(group.tokens_per_block) * int(spec.blocks_per_chunk),
        keeps_all=most == math.inf,
    )


def _reach(kv_spec: Any) -> float:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    if isinstance(kv_spec, FullAttentionSpec):
        return math.inf
    window = getattr(kv_spec, "sliding_window", None)
    return float(window or getattr(kv_spec, "attention_chunk_size", None) or 0)
