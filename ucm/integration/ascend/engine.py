"""What is particular about an engine of vllm-ascend, read from its configuration.

    layers    K and V are two tensors [B, N, H, d], each in an allocation of its own for every
              layer; MLA's are the latent [B, N, 1, c] and the rope part [B, N, 1, r]
    rope      the kernel that writes MLA's cache stores the even elements of the rope part before
              the odd ones, where CUDA's leaves the pairs as they are
    specs     MLA has a type of vllm-ascend's own, which also stands for caches with indexers

All of it is read in vllm-ascend's sources and replayed by tests on a CPU. What nobody has run on an
NPU is listed in docs/platforms.md.
"""

from __future__ import annotations

from typing import Any, Final

from ucm.config.settings import Settings
from ucm.errors import UnsupportedEngine

_DEVICE_TYPE: Final = "npu"
_MLA_SPEC: Final = "AscendMLAAttentionSpec"
# Fields of that spec, by one version or another, that are set where there is more than that.
_OF_UNLIKE_MLA: Final = (
    *("scale_dim", "cache_sparse_c8", "cache_sparse_sfa_c8", "cache_sparse_li_c8"),
    "store_on_host",
)

# What the layers are that have a spec of such a type, and why they are refused.
REFUSED_SPECS: Final = {
    _MLA_SPEC: (
        "MLA layers with an indexer or scales beside them",
        "UCM stores MLA without them on an NPU; run it without UCM",
    ),
    "AscendSlidingWindowMLASpec": (
        "MLA layers with a sliding window",
        "UCM can't store them yet; run it without UCM",
    ),
}


def is_ascend(device_type: str) -> bool:
    return device_type == _DEVICE_TYPE


def keeps_its_layout(device_type: str) -> bool:
    """Whether there is one layout, and no other can be asked for."""
    return is_ascend(device_type)


def keeps_plain_order(device_type: str) -> bool:
    """Whether shapes show all of the order inside a block, but for what is told below."""
    return is_ascend(device_type)


def keeps_rope_halves(device_type: str) -> bool:
    """Whether MLA's rope part lies as its even elements and then the odd ones."""
    return is_ascend(device_type)


def is_plain_mla(spec: Any) -> bool:
    """A latent and a rope part for each token, and nothing beside them."""
    if type(spec).__name__ != _MLA_SPEC or getattr(spec, "sparse_head_dim", None) is not None:
        return False
    return not any(getattr(spec, name, False) for name in _OF_UNLIKE_MLA)


def refuse_what_is_unlike(
    vllm_config: Any,
    settings: Settings,
    *,
    device_type: str,
    has_mla: bool,
    kv_dtypes: frozenset[Any],
) -> None:
    """Raises UnsupportedEngine for what vllm-ascend can be told to do and UCM can't follow."""
    if not is_ascend(device_type):
        return
    _refuse_quantized_kv(vllm_config, kv_dtypes)
    if has_mla:
        _refuse_unlike_mla(vllm_config, settings)


def _refuse_quantized_kv(vllm_config: Any, kv_dtypes: frozenset[Any]) -> None:
    """What a checkpoint may ask for, without a word of it among the engine's flags."""
    unlike = kv_dtypes - {vllm_config.model_config.dtype}
    if vllm_config.cache_config.cache_dtype == "auto" and unlike:
        raise UnsupportedEngine(
            f"this model's weights make vllm-ascend keep KV as {min(map(str, unlike))}, with "
            "scales that UCM does not know: run it without UCM"
        )


def _refuse_unlike_mla(vllm_config: Any, settings: Settings) -> None:
    if (getattr(vllm_config, "additional_config", None) or {}).get("enable_kv_nz"):
        raise UnsupportedEngine(
            "enable_kv_nz keeps MLA's cache in an order of the NPU's that its shape does not show: "
            "leave it out of --additional-config"
        )
    if settings.use_layerwise:
        raise UnsupportedEngine(
            "use_layerwise is not for MLA on an NPU: vllm-ascend does not wait for a layer's load "
            "in steps without a prefill; leave it out"
        )
    config = vllm_config.model_config.hf_text_config
    if getattr(config, "rope_interleave", True) is False:
        raise UnsupportedEngine(
            "this model rotates the halves of MLA's rope part (rope_interleave is false), and in "
            "which order an NPU stores it then nobody has read: run it without UCM"
        )
