"""What vLLM keeps of each layer: which kind of cache it is, and what of a prompt the layer needs.

vLLM describes a layer's cache by a spec. It puts layers into groups, whose blocks have ids of their
own; how many groups there are, and which layers are in one, says nothing of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ucm.errors import UnsupportedEngine
from ucm.integration.ascend.engine import REFUSED_SPECS, is_plain_mla
from ucm.integration.vllm.engine_versions import (
    hides_unlike_specs,
    packs_states,
    runs_of_specs,
    tokens_per_state,
)
from ucm.store.blocks.strands import ALL, STATE, Reach, ReachKind

_SHOWN_LAYERS: Final = 3
_LAYER_INDEX: Final = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")

# What the layers are that have a spec of such a type, and why they are refused.
_REFUSED: Final = {
    "SlidingWindowMLASpec": (
        "MLA layers with a sliding window",
        "UCM can't store them yet; run it without UCM",
    ),
    "CrossAttentionSpec": (
        "cross-attention layers",
        "their KV is that of an encoder's input and not of a prompt; run it without UCM",
    ),
    "EncoderOnlyAttentionSpec": (
        "layers of an encoder",
        "a token's KV depends on those that follow it; run it without UCM",
    ),
    "RSWASpec": (
        "layers with a reference sliding window",
        "UCM can't store them; run it without UCM",
    ),
    "SinkFullAttentionSpec": (
        "layers with static sinks before the prompt",
        "UCM can't store them; run it without UCM",
    ),
    "CircularBufferSpec": (
        "layers that compress their KV and keep what is left in a ring",
        "UCM can't store it; run it without UCM",
    ),
    "HiddenStateCacheSpec": (
        "a cache of hidden states",
        "it is no KV; leave extract_hidden_states out of --speculative-config",
    ),
    **REFUSED_SPECS,
}
_OTHER: Final = (
    "layers of a kind that UCM doesn't know",
    "it stores full attention, MLA, windows, chunked attention and states; run it without UCM",
)
_INDEXER: Final = (
    "an indexer in a cache group of its own",
    "UCM stores those that share the blocks of MLA layers; run it without UCM",
)


@dataclass(frozen=True)
class CachedLayer:
    """A layer that has a cache of its own, and the number of the group it is in. `block_bytes` are
    those of one of the engine's blocks where that is all that both sides of an engine know of it
    (`spec` is then that of the group's first layer, on one of them); else 0."""

    name: str
    group: int
    spec: Any
    reach: Reach
    block_bytes: int = 0


def cached_layers(kv_cache_config: Any) -> list[CachedLayer]:
    """In the order of groups. Raises UnsupportedEngine if there is one that can't be stored."""
    layers: list[CachedLayer] = []
    refused: dict[tuple[str, str, str], list[str]] = {}
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        _refuse_what_is_elsewhere(group)
        if hides_unlike_specs(kv_cache_config, group):
            raise _unlike_layers(number)
        untold = _untold(kv_cache_config, group)
        if untold:
            _refuse_untold_specs(number, group)
        for name, spec in _specs_of(group):
            reach = ALL if untold else _reach(spec)
            if reach is None:
                kind = type(spec).__name__
                what, why = _INDEXER if _is_indexer(spec) else _REFUSED.get(kind, _OTHER)
                refused.setdefault((what, kind, why), []).append(name)
            else:
                if not untold:
                    _refuse_what_is_no_plain_kv(spec, reach)
                layers.append(CachedLayer(name, number, spec, reach, untold.get(name, 0)))
    for (what, kind, why), names in refused.items():
        raise UnsupportedEngine(f"this model has {what} ({kind} in {_shown(names)}): {why}")
    if not layers:
        raise UnsupportedEngine("this model keeps no KV cache: there is nothing to store of it")
    return layers


def layer_index(layer_name: str) -> int:
    """The number in a name like `model.layers.7.self_attn.attn`."""
    numbers = _LAYER_INDEX.findall(layer_name)
    if len(numbers) != 1:
        raise UnsupportedEngine(f"can't tell the layer's number from its name {layer_name!r}")
    return int(numbers[0])


def _specs_of(group: Any) -> Iterator[tuple[str, Any]]:
    by_layer = getattr(group.kv_cache_spec, "kv_cache_specs", None)
    for name in group.layer_names:
        yield name, group.kv_cache_spec if by_layer is None else by_layer[name]


def _reach(spec: Any) -> Reach | None:
    """None of what can't be stored. By the very type: those that are derived from one of these keep
    something else."""
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        MambaSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
    )

    kind = type(spec)
    is_whole = kind in (FullAttentionSpec, MLAAttentionSpec) or is_plain_mla(spec)
    if is_whole and not _is_indexer(spec):
        return ALL
    if kind is SlidingWindowSpec:
        return Reach(ReachKind.WINDOW, int(spec.sliding_window))
    if kind is ChunkedLocalAttentionSpec:
        return Reach(ReachKind.CHUNK, int(spec.attention_chunk_size))
    return STATE if kind is MambaSpec else None


def _is_indexer(spec: Any) -> bool:
    role = getattr(spec, "cache_role", None)
    return getattr(role, "value", "") == "indexer"


def _refuse_what_is_no_plain_kv(spec: Any, reach: Reach) -> None:
    if reach == STATE:
        _refuse_states_that_are_not_kept(spec)
        return
    if not _is_causal(spec):
        raise UnsupportedEngine(
            "this model's attention is not causal: a token's KV depends on those that follow it"
        )
    if packs_states(spec):
        raise UnsupportedEngine("this KV cache dtype packs its own scales or states into a block")


def _refuse_states_that_are_not_kept(spec: Any) -> None:
    """A state is that of the last token computed; only with prefix caching vLLM keeps others, and
    says which."""
    if spec.mamba_cache_mode != "align":
        raise UnsupportedEngine(
            "this model has linear-attention or Mamba layers, whose states vLLM keeps only with "
            "prefix caching: set --enable-prefix-caching"
        )
    if spec.num_speculative_blocks:
        raise UnsupportedEngine(
            "this model has linear-attention or Mamba layers, whose states hold guessed tokens "
            "with speculative decoding, and UCM can't tell them apart yet: leave out "
            "--speculative-config"
        )


def _refuse_what_is_elsewhere(group: Any) -> None:
    if getattr(group, "host_resident", False) or not getattr(group, "enable_kv_transfer", True):
        raise UnsupportedEngine(
            "this engine keeps a part of its KV in host memory (HiSparse), where UCM can't copy "
            "it: leave hisparse_config out of --attention-config"
        )


def _untold(kv_cache_config: Any, group: Any) -> dict[str, int]:
    """How many bytes a block of each layer has, if the layers of this group have several specs.
    vLLM's scheduler is told one of them, whatever the layers are. But they lie in memory one spec
    after the other, which it is told."""
    names = set(group.layer_names)
    tensors = runs_of_specs(kv_cache_config, names)
    if len(tensors) < 2:
        return {}
    # Either all blocks of a layer follow each other, or all layers of a block.
    sizes = [(min(each.layer_stride, each.block_stride), each.layers) for each in tensors]
    return {name: int(size) for size, layers in sizes for name in layers}


def _refuse_untold_specs(number: int, group: Any) -> None:
    """MLA layers, and the indexers beside them, are kept once whatever the ranks are, and need no
    more to be known: their blocks are stored as they are."""
    specs = [spec for _, spec in _specs_of(group)]
    if all(_is_latent(spec) for spec in specs):
        return
    raise _unlike_layers(number)


def _unlike_layers(number: int) -> UnsupportedEngine:
    return UnsupportedEngine(
        f"the layers of this model's KV cache group {number} differ in the shape of their KV, "
        "and vLLM's scheduler does not know how: run it without UCM"
    )


def _is_latent(spec: Any) -> bool:
    """By the very type, and a state for each token."""
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    return type(spec) is MLAAttentionSpec and _is_causal(spec) and tokens_per_state(spec) == 1


def _is_causal(spec: Any) -> bool:
    return not getattr(spec, "non_causal", False)


def _shown(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN_LAYERS
    return ", ".join(names[:_SHOWN_LAYERS]) + (f" and {more} more" if more > 0 else "")
