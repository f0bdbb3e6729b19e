"""KV tensors of an engine as views with named dimensions. Nothing is copied here.

`layer_view` turns what an engine registers for one layer into parts `[block, head, unit, size]`:
one for K and V together where they lie together, else one for each. Every difference between
backends, platforms and model families lives in that one function:

    kind     what the engine hands out                   parts
    PACKED   [B, H, N, K|V], any strides                 one
    CPU_VEC  [B, H, N, K|V] by name; inside a block      K (transposed back by strides), V
             K is [d][N] and V is [N][d]
    SPLIT    [2, B, N, H, d], or (K, V) each [B, N, H, d]  K, V
    MLA      [B, N, C], [B, 1, N, C] or [B, N, 1, C];    one per tensor
             or a tuple of those that share C
    OPAQUE   anything whose blocks are runs of bytes     one: head and unit are 1, size is bytes

The parts of a layer, put side by side along `size`, are the content of a page. `placed_parts` adds
where they lie in a page, and joins layers that lie at one distance in one storage, so that a block
of all layers is a single strided tensor.

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
from ucm.store.blocks.page import PageGeometry, RankShare

KV: TypeAlias = Tensor | Sequence[Tensor]

_INTEGER_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class LayerView:
    """One layer. Each part is [block, head, unit, size], K before V; only the sizes differ."""

    parts: tuple[Tensor, ...]

    @property
    def num_units(self) -> int:
        """Units in one block."""
        return self.parts[0].shape[2]


def layer_view(
    kv: KV, *, kind: LayoutKind, geometry: PageGeometry, num_heads: int, block_tokens: int
) -> LayerView:
    """The view of one layer's KV: `num_heads` heads of this rank in blocks of `block_tokens`.

    Raises UnsupportedEngine if the tensors are not what `kind` says they are.
    """
    tensors = (kv,) if isinstance(kv, Tensor) else tuple(kv)
    if kind is LayoutKind.OPAQUE:
        parts: tuple[Tensor, ...] = (_raw_blocks(_only(tensors, kind)),)
    elif kind is LayoutKind.CPU_VEC:
        parts = _cpu_vec_parts(_only(tensors, kind), geometry=geometry)
    elif kind is LayoutKind.PACKED:
        parts = (_of_rank(_only(tensors, kind), 4, kind),)
    elif kind is LayoutKind.SPLIT:
        if len(tensors) == 1:
            tensors = tuple(_of_rank(tensors[0], 5, kind).unbind(0))
        parts = tuple(_of_rank(t, 4, kind).transpose(1, 2) for t in tensors)
    else:
        parts = tuple(_latent(t) for t in tensors)
    if block_tokens % geometry.unit_tokens:
        raise UnsupportedEngine(
            f"blocks of {block_tokens} tokens are not whole units of {geometry.unit_tokens} tokens"
        )
    block_shape = (num_heads, block_tokens // geometry.unit_tokens)
    _check(parts, kind=kind, geometry=geometry, block_shape=block_shape)
    return LayerView(tuple(p.view(_INTEGER_OF_BYTES[p.element_size()]) for p in parts))


def _only(tensors: tuple[Tensor, ...], kind: LayoutKind) -> Tensor:
    if len(tensors) != 1:
        raise UnsupportedEngine(
            f"the KV cache of a layer is {len(tensors)} tensors, layout {kind.value} takes one"
        )
    return tensors[0]


def _of_rank(tensor: Tensor, rank: int, kind: LayoutKind) -> Tensor:
    if tensor.dim() != rank:
        raise UnsupportedEngine(
            f"the KV cache of a layer has shape {list(tensor.shape)}, "
            f"layout {kind.value} takes {rank} dimensions"
        )
    return tensor


def _cpu_vec_parts(kv: Tensor, *, geometry: PageGeometry) -> tuple[Tensor, Tensor]:
    """vLLM's `vec` and `vec16` CPU kernels: per head of a block [d][N] of K, then [N][d] of V."""
    num_blocks, num_heads, num_tokens, content = _of_rank(kv, 4, LayoutKind.CPU_VEC).shape
    size = geometry.k_size
    dense_head = kv.stride()[2:] == (content, 1)
    if content != 2 * size or geometry.v_size != size or not dense_head:
        raise UnsupportedEngine(
            f"the KV cache of a layer has shape {list(kv.shape)} and strides {list(kv.stride())}; "
            f"the CPU kernel's own order needs dense heads of {size} + {size} elements per token"
        )
    shape = (num_blocks, num_heads, num_tokens, size)
    outer, start = kv.stride()[:2], kv.storage_offset()
    keys = kv.as_strided(shape, (*outer, 1, num_tokens), start)
    values = kv.as_strided(shape, (*outer, size, 1), start + num_tokens * size)
    return keys, values


def _latent(kv: Tensor) -> Tensor:
    """MLA's latent as [block, 1, token, size]: the one head may be first, last, or left out."""
    if kv.dim() == 4 and kv.shape[1] == 1:
        return kv
    if kv.dim() == 4 and kv.shape[2] == 1:
        return kv.transpose(1, 2)
    return _of_rank(kv, 3, LayoutKind.MLA).unsqueeze(1)


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


def _check(
    parts: tuple[Tensor, ...],
    *,
    kind: LayoutKind,
    geometry: PageGeometry,
    block_shape: tuple[int, int],
) -> None:
    """The view must be the content of this rank's heads, whatever the engine said of it."""
    num_blocks = parts[0].shape[0]
    sizes = tuple(p.shape[3] for p in parts)
    items = {p.element_size() for p in parts}
    in_order = kind not in (LayoutKind.SPLIT, LayoutKind.CPU_VEC) or sizes == (
        geometry.k_size,
        geometry.v_size,
    )
    if (
        any(tuple(p.shape[:3]) != (num_blocks, *block_shape) for p in parts)
        or sum(sizes) != geometry.content_size
        or not in_order
        or items != {geometry.item_bytes}
    ):
        num_heads, num_units = block_shape
        raise UnsupportedEngine(
            f"the KV cache of a layer, read as {kind.value}, has parts "
            f"{[list(p.shape) for p in parts]} of {sorted(items)} bytes per item; expected blocks "
            f"of {num_heads} heads, {num_units} units and {geometry.k_size} + {geometry.v_size} "
            f"elements of {geometry.item_bytes} bytes"
        )


@dataclass(frozen=True)
class PlacedPart:
    """One part of neighbouring layers, and where it lies in a page.

    `tensor` is [layer, block, head, unit, size]; `layers` are positions in the rank's share.
    In a page the element [layer, head, unit, i] lies `page_offset_bytes` after the slot's start,
    plus `page_strides` (of layer, head, unit, i; in elements of `tensor`).
    """

    layers: range
    tensor: Tensor
    page_offset_bytes: int
    page_strides: tuple[int, int, int, int]

    @property
    def num_units(self) -> int:
        return self.tensor.shape[3]

    def in_slot(self, memory: Tensor, *, slot_offset: int, first_unit: int) -> Tensor:
        """[layer, head, unit, size] of one block, in the page whose slot starts at `slot_offset`.

        `memory` is all of the slots' memory as one flat tensor of this part's dtype.
        """
        _, _, heads, units, size = self.tensor.shape
        start = (slot_offset + self.page_offset_bytes) // self.tensor.element_size()
        start += first_unit * self.page_strides[2]
        return memory.as_strided((len(self.layers), heads, units, size), self.page_strides, start)

    def within(self, layers: range) -> PlacedPart:
        """The same part of some of its layers."""
        index = self.layers.index(layers.start)
        step_bytes = self.page_strides[0] * self.tensor.element_size()
        return PlacedPart(
            layers=layers,
            tensor=self.tensor[index : index + len(layers)],
            page_offset_bytes=self.page_offset_bytes + index * step_bytes,
            page_strides=self.page_strides,
        )


def placed_parts(
    views: Sequence[LayerView], *, geometry: PageGeometry, share: RankShare
) -> tuple[PlacedPart, ...]:
    """All parts of all layers of a rank, joined over layers where their strides allow it."""
    if len(views) != len(share.layers):
        raise ValueError(f"{len(views)} layer views for {len(share.layers)} layers")
    placed: list[PlacedPart] = []
    start = 0
    while start < len(views):
        end = start + 1
        while end < len(views) and _joins(views, start, end):
            end += 1
        layers = range(start, end)
        content_bytes = 0
        for index, part in enumerate(views[start].parts):
            tensor = _widest(_join([view.parts[index] for view in views[start:end]]), geometry)
            first = geometry.offset(share.layers[start], share.heads.start)
            item_bytes = tensor.element_size()
            strides = (geometry.layer_bytes, geometry.head_bytes, geometry.unit_bytes, item_bytes)
            layer_stride, head_stride, unit_stride, _ = (s // item_bytes for s in strides)
            placed.append(
                PlacedPart(
                    layers=layers,
                    tensor=tensor,
                    page_offset_bytes=first + content_bytes,
                    page_strides=(layer_stride, head_stride, unit_stride, 1),
                )
            )
            content_bytes += part.shape[3] * part.element_size()
        start = end
    return tuple(placed)


def _joins(views: Sequence[LayerView], start: int, layer: int) -> bool:
    """Whether `layer` continues the layers from `start`: one storage, one form, one distance."""
    first, second, before, this = (views[i].parts for i in (start, start + 1, layer - 1, layer))
    step = second[0].storage_offset() - first[0].storage_offset()
    if step <= 0 or len(this) != len(first):
        return False
    return all(
        c.untyped_storage().data_ptr() == a.untyped_storage().data_ptr()
        and (c.dtype, c.shape, c.stride()) == (a.dtype, a.shape, a.stride())
        and c.storage_offset() - b.storage_offset() == step
        for a, b, c in zip(first, before, this, strict=True)
    )


def _join(layers: Sequence[Tensor]) -> Tensor:
    """[layer, block, head, unit, size] of layers that `_joins` has found to lie at one distance."""
    first = layers[0]
    step = layers[1].storage_offset() - first.storage_offset() if len(layers) > 1 else 0
    shape, stride = (len(layers), *first.shape), (step, *first.stride())
    return first.as_strided(shape, stride, first.storage_offset())


def _widest(tensor: Tensor, geometry: PageGeometry) -> Tensor:
    """The same bytes as the widest integers that all strides, here and in the page, allow."""
    item_bytes = tensor.element_size()
    numbers = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    in_bytes = [n * item_bytes for n in numbers]
    in_bytes += [tensor.data_ptr(), geometry.k_size * geometry.item_bytes, geometry.unit_bytes]
    for width in (8, 4, 2):
        if width <= item_bytes or tensor.stride(-1) != 1:
            break
        if all(n % width == 0 for n in in_bytes):
            return tensor.view(_INTEGER_OF_BYTES[width])
    return tensor
