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
    STATE    the same                                    one, for each field (`state_view`)

The parts of a layer, put side by side along `size`, are the content of a page; `placement` says
where they lie in one.

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
from ucm.integration.copies.state_field import StateField
from ucm.store.blocks.page_layout import PageGeometry

KV: TypeAlias = Tensor | Sequence[Tensor]

INTEGER_OF_BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    return LayerView(tuple(p.view(INTEGER_OF_BYTES[p.element_size()]) for p in parts))


def state_view(kv: KV, field: StateField, *, num_heads: int) -> LayerView:
    """The view of one field of a layer's states, of which this rank has `num_heads` heads.

    Raises UnsupportedEngine if the engine's blocks are not runs of bytes that hold it.
    """
    raw = _raw_blocks(_only((kv,) if isinstance(kv, Tensor) else tuple(kv), LayoutKind.STATE))
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
