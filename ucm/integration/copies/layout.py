"""KV tensors of an engine as views with named dimensions. Nothing is copied here.

`layer_view` turns what an engine registers for one layer into parts `[block, head, unit, size]`:
one for K and V together where they lie together, else one for each. Every difference between
backends, platforms and model families lies here and in what its tensors are told by, `shapes`:

    kind         what the engine hands out                       parts
    AS_SHAPED    K and V in one tensor, or two                   one, or K and V
                 MLA in one tensor, or two                       one per tensor
    CPU_VEC      [B, H, N, K|V] by name; inside a block          K (transposed back by strides), V
                 K is [d][N] and V is [N][d]
    ROPE_HALVES  MLA in two tensors; in the second the even      the latent; the rope part's two
                 elements of the rope part, and then its odd     halves side by side
    OPAQUE       anything whose blocks are runs of bytes         one: head and unit are 1, size is
                                                                 bytes
    STATE        the same                                        one, for each field (`state_view`)

The parts of a layer together are the content of a page, and each has its place in it; `placement`
says where they lie in a page.

Bits are moved, never values: parts are integers of the width of the items (wider where strides
allow), so that a NaN stays the NaN it was and no dtype lacks a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ucm.errors import UnsupportedEngine
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.copies.shapes import RankBlock, readings, shapes_text
from ucm.integration.copies.state_field import StateField
from ucm.store.blocks.page_layout import PageGeometry

KV: TypeAlias = Tensor | Sequence[Tensor]

INTEGER_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class ContentPlace:
    """Where a part's elements are in the content of a unit: `first`, and every `step` from there.
    The heads of a part with a `piece_step` are no heads of the model but pieces of a single one's
    content, that far from each other."""

    first: int
    step: int = 1
    piece_step: int = 0


@dataclass(frozen=True)
class LayerView:
    """One layer. Each part is [block, head, unit, size], and has a place; unless said otherwise
    they are side by side, K before V."""

    parts: tuple[Tensor, ...]
    places: tuple[ContentPlace, ...] = ()

    def __post_init__(self) -> None:
        if not self.places:
            sizes = [part.shape[3] for part in self.parts]
            firsts = (sum(sizes[:number]) for number in range(len(sizes)))
            object.__setattr__(self, "places", tuple(map(ContentPlace, firsts)))

    @property
    def num_units(self) -> int:
        """Units in one block."""
        return self.parts[0].shape[2]


def layer_view(
    kv: KV,
    *,
    kind: LayoutKind,
    geometry: PageGeometry,
    num_heads: int,
    block_tokens: int,
    layer: str = "",
) -> LayerView:
    """The view of the KV of `layer`: `num_heads` heads of this rank in blocks of `block_tokens`.

    Raises UnsupportedEngine for tensors that can't be told, or are not what `kind` says they are.
    """
    if block_tokens % geometry.unit_tokens:
        raise UnsupportedEngine(
            f"blocks of {block_tokens} tokens are not whole units of {geometry.unit_tokens} tokens"
        )
    tensors = tensors_of(kv, layer)
    block = RankBlock(geometry, num_heads, block_tokens // geometry.unit_tokens)
    places: tuple[ContentPlace, ...] = ()
    found: list[tuple[Tensor, ...]]
    if kind is LayoutKind.OPAQUE:
        found = [(_raw_blocks(each),) for each in tensors] if len(tensors) == 1 else []
        found = [parts for parts in found if block.holds(parts)]
    elif kind is LayoutKind.CPU_VEC:
        found = _cpu_vec_parts(tensors, block)
    else:
        found = readings(tensors, block)
    if kind is LayoutKind.ROPE_HALVES:
        found = [_rope_halves(parts) for parts in found if _has_rope_halves(parts)]
        places = _places_of_rope_halves(found[0]) if found else ()
    items = {part.element_size() for parts in found for part in parts}
    if len(found) != 1 or items != {geometry.item_bytes}:
        raise UnsupportedEngine(_untold(tensors, kind, block, len(found), layer))
    (parts,) = found
    return LayerView(tuple(p.view(INTEGER_OF_BYTES[p.element_size()]) for p in parts), places)


def tensors_of(kv: KV, layer: str = "") -> tuple[Tensor, ...]:
    """Raises UnsupportedEngine for anything else than tensors."""
    if isinstance(kv, Tensor):
        return (kv,)
    if not isinstance(kv, (tuple, list)) or not kv or not all(isinstance(x, Tensor) for x in kv):
        raise UnsupportedEngine(
            f"the KV cache of {layer or 'a layer'} is no tensor and no tuple of tensors: "
            f"{type(kv).__name__}"
        )
    return tuple(kv)


def state_view(kv: KV, field: StateField, *, num_heads: int) -> LayerView:
    """The view of one field of a layer's states, of which this rank has `num_heads` heads.

    Raises UnsupportedEngine if the engine's blocks are not runs of bytes that hold it.
    """
    tensors = tensors_of(kv)
    if len(tensors) != 1:
        raise UnsupportedEngine(
            f"the states of a layer are {shapes_text(tensors)}, where UCM takes one tensor"
        )
    raw = _raw_blocks(tensors[0])
    geometry, item_bytes = field.geometry, field.geometry.item_bytes
    shape = (num_heads, geometry.num_units, geometry.content_size)
    last = sum((size - 1) * step for size, step in zip(shape, field.strides, strict=True))
    end_bytes = field.block_offset_bytes + (last + 1) * item_bytes
    starts = (raw.storage_offset(), raw.stride(0), field.block_offset_bytes)
    if end_bytes > raw.shape[3] or any(start % item_bytes for start in starts):
        raise UnsupportedEngine(
            f"the states of a layer are blocks of {raw.shape[3]} bytes {raw.stride(0)} apart, "
            f"where {field.name} ends at {end_bytes} and has items of {item_bytes} bytes"
        )
    dtype = INTEGER_OF_BYTES[item_bytes]
    start = (raw.storage_offset() + field.block_offset_bytes) // item_bytes
    part = torch.empty(0, dtype=dtype, device=raw.device).set_(
        raw.untyped_storage(),
        start,
        (raw.shape[0], *shape),
        (raw.stride(0) // item_bytes, *field.strides),
    )
    return LayerView((part,))


def _untold(
    tensors: Sequence[Tensor], kind: LayoutKind, block: RankBlock, num_ways: int, layer: str
) -> str:
    """For people."""
    geometry = block.geometry
    dtypes = " and ".join(sorted({str(each.dtype).removeprefix("torch.") for each in tensors}))
    means = "may mean two things" if num_ways > 1 else "is no layout that UCM knows"
    return (
        f"the KV cache of {layer or 'a layer'} is {shapes_text(tensors)} of {dtypes}, which {means}"
        f" of {block.num_heads} heads, {block.num_units} units and {geometry.k_size} + "
        f"{geometry.v_size} elements of {geometry.item_bytes} bytes ({kind.value})"
    )


def _cpu_vec_parts(tensors: Sequence[Tensor], block: RankBlock) -> list[tuple[Tensor, ...]]:
    """vLLM's `vec` and `vec16` CPU kernels: per head of a block [d][N] of K, then [N][d] of V."""
    geometry, size = block.geometry, block.geometry.k_size
    if len(tensors) != 1 or tensors[0].dim() != 4 or geometry.v_size != size:
        return []
    (kv,) = tensors
    num_blocks, num_heads, num_tokens, content = kv.shape
    if not block.holds(tensors) or kv.stride()[2:] != (content, 1):
        return []
    shape = (num_blocks, num_heads, num_tokens, size)
    outer, start = kv.stride()[:2], kv.storage_offset()
    keys = kv.as_strided(shape, (*outer, 1, num_tokens), start)
    values = kv.as_strided(shape, (*outer, size, 1), start + num_tokens * size)
    return [(keys, values)]


def _has_rope_halves(parts: Sequence[Tensor]) -> bool:
    return len(parts) == 2 and parts[1].shape[3] % 2 == 0


def _rope_halves(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The rope part as [block, half, unit, size], by strides, so that it is still all of its
    tensor."""
    latent, rope = parts
    num_blocks, _, num_units, size = rope.shape
    block, _, unit, item = rope.stride()
    shape, strides = (num_blocks, 2, num_units, size // 2), (block, size // 2 * item, unit, item)
    return latent, rope.as_strided(shape, strides, rope.storage_offset())


def _places_of_rope_halves(parts: Sequence[Tensor]) -> tuple[ContentPlace, ...]:
    """An element of the one half, and then its neighbour in the other."""
    return ContentPlace(0), ContentPlace(parts[0].shape[3], step=2, piece_step=1)


def _raw_blocks(kv: Tensor) -> Tensor:
    """[block, 1, 1, bytes], if every block is one run of bytes."""
    num_blocks, item_bytes = kv.shape[0], kv.element_size()
    expected = 1
    for size, stride in sorted(zip(kv.shape[1:], kv.stride()[1:], strict=True), key=lambda d: d[1]):
        if size > 1 and stride != expected:
            raise UnsupportedEngine(
                f"the KV cache of a layer has shape {list(kv.shape)} and strides "
                f"{list(kv.stride())}: its blocks are not runs of bytes, so they have no raw form"
            )
        expected *= size
    block_bytes, stride_bytes = expected * item_bytes, kv.stride(0) * item_bytes
    return torch.empty(0, dtype=torch.uint8, device=kv.device).set_(
        kv.untyped_storage(),
        kv.storage_offset() * item_bytes,
        (num_blocks, 1, 1, block_bytes),
        (stride_bytes, block_bytes, block_bytes, 1),
    )
