"""How the KV of a strand lies in the engine's blocks, and in a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ucm.config.settings import Settings
from ucm.errors import UnsupportedEngine
from ucm.integration.ascend.engine import keeps_plain_order, keeps_rope_halves
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.vllm.engine_versions import block_bytes, layout_in_use, release_text
from ucm.store.blocks.page_layout import PageGeometry

# The instruction sets of vLLM's CPU attention whose order inside a block is a strided view.
_CPU_STRIDED_ISAS = ("vec", "vec16")
# Devices whose backends have been read: behind shapes their orders are these.
_READ = ("cpu", "cuda", "xpu")


def layout_of(vllm_config: Any, spec: Any, settings: Settings) -> tuple[LayoutKind, str]:
    """What the tensors won't show of how the backend orders bytes inside a block, and a name for it
    (empty: canonical)."""
    from vllm.platforms import current_platform

    device = current_platform.device_type
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    place = f"block{spec.block_size}:tp{tp_size}"
    if device == "cpu" and not _is_mla(spec):
        isa = _cpu_isa(vllm_config, spec)
        if isa in _CPU_STRIDED_ISAS and settings.kv_layout == "auto":
            return LayoutKind.CPU_VEC, ""
        return LayoutKind.OPAQUE, f"cpu:{isa}:{place}"
    if current_platform.is_rocm():
        _refuse_shuffled_blocks()
    if settings.kv_layout == "opaque":
        layout = layout_in_use(vllm_config)
        if layout is None:
            raise UnsupportedEngine(
                "kv_layout is opaque, and vLLM does not say which layout it uses: its bytes can't "
                "be named"
            )
        return LayoutKind.OPAQUE, f"{device}:{layout}:{place}"
    if device not in _READ and not keeps_plain_order(device):
        raise UnsupportedEngine(
            f"UCM does not know the order in which kernels for {device} keep a block, and shapes "
            "don't show all of it: set kv_layout: opaque, and blocks are stored as they are"
        )
    if _is_mla(spec) and keeps_rope_halves(device):
        return LayoutKind.ROPE_HALVES, ""
    return LayoutKind.AS_SHAPED, ""


def _refuse_shuffled_blocks() -> None:
    from vllm import envs

    if getattr(envs, "VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT", False):
        raise UnsupportedEngine(
            "VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT keeps KV in an order of the kernel's that its shape "
            "does not show: unset it"
        )


def refuse_hidden_order(layer: str, shape: Sequence[int]) -> None:
    """AMD's ROCM_ATTN kernels spread a key's elements over a block, and older versions of vLLM
    register that as [2, B, N, H, d]."""
    from vllm.platforms import current_platform

    if current_platform.is_rocm() and len(shape) == 5 and shape[0] == 2:
        raise UnsupportedEngine(
            f"the KV cache of {layer} is {list(shape)}, whose order inside a block is one of this "
            "kernel's own: choose another by --attention-backend"
        )


def order_inside_blocks(vllm_config: Any, spec: Any) -> str:
    """A name for it, where the processor decides it; empty elsewhere."""
    from vllm.platforms import current_platform

    if current_platform.device_type != "cpu" or _is_mla(spec) or not hasattr(spec, "head_size"):
        return ""
    return _cpu_isa(vllm_config, spec)


def name_of_raw_blocks(spec: Any) -> str:
    """Of MLA and its indexer, which all ranks have alike. What kernels make of an indexer's block
    is theirs: on AMD's accelerators its numbers are those of one of two kinds of fp8, and their
    order depends on which kernels vLLM has been told to use, and may change with a version."""
    from vllm.platforms import current_platform

    name = str(current_platform.device_name)
    if current_platform.is_rocm():
        from vllm import __version__, envs

        kernels = "aiter" if envs.VLLM_ROCM_USE_AITER else "own"
        numbers = "fnuz" if current_platform.is_fp8_fnuz() else "ocp"
        name = f"{name}-{numbers}-{kernels}-{release_text(__version__)}"
    return f"{name}:mla:block{spec.block_size}"


def _is_mla(spec: Any) -> bool:
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    return isinstance(spec, MLAAttentionSpec)


def _cpu_isa(vllm_config: Any, spec: Any) -> str:
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    return str(
        _get_attn_isa(
            vllm_config.model_config.dtype,
            spec.block_size,
            spec.head_size,
            vllm_config.cache_config.cache_dtype,
        )
    )


def geometry_of(
    vllm_config: Any,
    spec: Any,
    settings: Settings,
    layout: LayoutKind,
    *,
    layer: int,
    num_layers: int,
    is_only: bool,
) -> PageGeometry:
    """Of layers like that with the number `layer`. `is_only`: all of the model are."""
    if layout is LayoutKind.OPAQUE:
        return geometry_of_raw_blocks(
            settings,
            spec,
            num_layers=num_layers,
            num_heads=int(vllm_config.parallel_config.tensor_parallel_size),
            block_bytes=block_bytes(spec),
        )
    is_mla = _is_mla(spec)
    if is_mla:
        heads = 1
    elif is_only:
        heads = int(vllm_config.model_config.get_total_num_kv_heads())
    else:
        heads = _total_heads(vllm_config, spec, layer)
    return PageGeometry(
        num_layers=num_layers,
        num_kv_heads=heads,
        block_tokens=settings.block_tokens,
        k_size=int(spec.head_size),
        v_size=0 if is_mla else int(spec.head_size_v),
        item_bytes=int(spec.dtype.itemsize),
    )


def geometry_of_raw_blocks(
    settings: Settings, spec: Any, *, num_layers: int, num_heads: int, block_bytes: int
) -> PageGeometry:
    """Of `num_heads` ranks that have blocks of their own."""
    return PageGeometry(
        num_layers=num_layers,
        num_kv_heads=num_heads,
        block_tokens=settings.block_tokens,
        k_size=block_bytes,
        v_size=0,
        item_bytes=1,
        unit_tokens=int(spec.block_size),
    )


def _total_heads(vllm_config: Any, spec: Any, layer: int) -> int:
    """Over all ranks. A rank with one head may share it with others, and only the model's own
    number says with how many; layers of another shape may have another number."""
    tp_size, heads = int(vllm_config.parallel_config.tensor_parallel_size), int(spec.num_kv_heads)
    if tp_size == 1 or heads > 1:
        return heads * tp_size
    total, head_size = _heads_of(vllm_config.model_config, layer)
    if total > tp_size or int(spec.head_size) != head_size:
        raise UnsupportedEngine(
            f"can't tell how many KV heads the layers with heads of {spec.head_size} have in all: "
            f"a rank has one of them. Use a smaller --tensor-parallel-size than {tp_size}"
        )
    return total


def _heads_of(model: Any, layer: int) -> tuple[int, int]:
    """How many KV heads that layer has in all, and how large they are. Not every vLLM that this
    runs on knows it layer by layer."""
    arch = getattr(model, "model_arch_config", None)
    if arch is None or not hasattr(arch, "per_layer_overrides"):
        return int(model.get_total_num_kv_heads()), int(model.get_head_size())
    return int(arch[layer].total_num_kv_heads), int(arch[layer].head_size)
