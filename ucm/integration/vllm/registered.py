"""What a rank registers at its start, as targets of copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ucm.errors import UnsupportedEngine
from ucm.integration.copies.layout import KV, layer_view, state_view, tensors_of
from ucm.integration.copies.shapes import num_blocks_of
from ucm.integration.copies.target import CopyTarget
from ucm.integration.engine.facts import EngineFacts, TargetFacts
from ucm.integration.vllm.strand_layout import refuse_hidden_order
from ucm.store.blocks.page_layout import RankShare


@dataclass(frozen=True)
class RegisteredTarget:
    """`kernel_blocks`: how many blocks of the tensors are one of vLLM's manager. Some kernels want
    smaller ones than it hands out, and ids then count those."""

    target: CopyTarget
    kernel_blocks: int


def registered_target(
    facts: EngineFacts, target: TargetFacts, share: RankShare, kv_caches: Mapping[str, Any]
) -> RegisteredTarget:
    """Raises UnsupportedEngine for layers that are missing, or whose layout can't be told."""
    missing = [name for name in target.layer_names if name not in kv_caches]
    if missing:
        raise UnsupportedEngine(f"vLLM registered no KV cache for layer {missing[0]}")
    geometry, num_heads = facts.geometry_of(target), len(share.heads)
    caches = {name: kv_caches[name] for name in target.layer_names}
    if target.field is not None:
        states = [state_view(kv, target.field, num_heads=num_heads) for kv in caches.values()]
        return RegisteredTarget(CopyTarget(states, geometry, share), 1)
    kernel_blocks = _kernel_blocks(facts, caches)
    views = [
        layer_view(
            kv,
            kind=facts.strands[target.strand].layout,
            geometry=geometry,
            num_heads=num_heads,
            block_tokens=target.block_tokens // kernel_blocks,
            layer=name,
        )
        for name, kv in caches.items()
    ]
    return RegisteredTarget(CopyTarget(views, geometry, share), kernel_blocks)


def _kernel_blocks(facts: EngineFacts, caches: Mapping[str, KV]) -> int:
    counts: dict[int, str] = {}
    for name, kv in caches.items():
        tensors = tensors_of(kv, name)
        refuse_hidden_order(name, tensors[0].shape)
        counts.setdefault(max(1, num_blocks_of(tensors) // facts.num_blocks), name)
    if len(counts) > 1:
        (one, first), (other, second) = list(counts.items())[:2]
        raise UnsupportedEngine(
            f"the KV cache of {first} has {one} blocks for each of vLLM's, and that of {second} "
            f"has {other}: UCM can't tell them apart"
        )
    return next(iter(counts))
