"""KV caches with known bytes in every layout, and what their pages must hold. Needs torch only.

A cache is described by `logical` [layer, block, head, token, content] integers. Each layout lays it
out with formulas of its own here, not with the views under test.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ucm.integration.copies.arena import Arena
from ucm.integration.copies.copy_engine import CopyEngine
from ucm.integration.copies.jobs import PagePart
from ucm.integration.copies.layout import KV, LayerView, layer_view
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.copies.target import CopyTarget
from ucm.store.blocks.page_layout import PageGeometry, RankShare, rank_share

# vLLM's names: the order of [layer, block, head, token, content] in memory.
_STRIDE_ORDERS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}


@dataclass(frozen=True)
class Cache:
    """The KV of one rank: what the engine registers per layer, and how to read it back. Layers that
    only a device may touch can't be shown."""

    layers: list[KV] = field(repr=False)
    kind: LayoutKind
    read: Callable[[], Tensor]


def packed(name: str, logical: Tensor) -> Cache:
    order = _STRIDE_ORDERS[name]
    stored = logical.permute(order).contiguous()
    inverse = [order.index(dim) for dim in range(5)]
    view = stored.permute(inverse)
    return Cache(list(view.unbind(0)), LayoutKind.AS_SHAPED, view.clone)


def cpu_vec(logical: Tensor) -> Cache:
    layers, blocks, heads, tokens, content = logical.shape
    size = content // 2
    stored = torch.empty_like(logical).view(layers, blocks, heads, 2, tokens * size)
    stored[..., 0, :] = logical[..., :size].transpose(-1, -2).reshape(stored[..., 0, :].shape)
    stored[..., 1, :] = logical[..., size:].reshape(stored[..., 1, :].shape)

    def read() -> Tensor:
        keys = stored[..., 0, :].reshape(layers, blocks, heads, size, tokens).transpose(-1, -2)
        return torch.cat([keys, stored[..., 1, :].reshape_as(keys)], dim=-1)

    return Cache(list(stored.view_as(logical).unbind(0)), LayoutKind.CPU_VEC, read)


def _apart(logical: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Of each layer the first `size` elements and the others, each [B, N, H, d]."""
    return [
        (x[..., :size].transpose(1, 2).contiguous(), x[..., size:].transpose(1, 2).contiguous())
        for x in logical
    ]


def split_tensor(logical: Tensor) -> Cache:
    """CUDA until 0.18: a tensor [2, B, N, H, d] of its own for every layer."""
    layers = [torch.stack(pair) for pair in _apart(logical, logical.shape[-1] // 2)]

    def read() -> Tensor:
        return torch.stack([torch.cat(list(x.transpose(2, 3)), dim=-1) for x in layers])

    return Cache(list(layers), LayoutKind.AS_SHAPED, read)


def split_in_blocks(logical: Tensor) -> Cache:
    """CUDA until 0.25, and HPC's kernels until 0.28: [B, 2, N, H, d]."""
    layers = [torch.stack(pair, dim=1) for pair in _apart(logical, logical.shape[-1] // 2)]

    def read() -> Tensor:
        pairs = [x.transpose(2, 3).unbind(1) for x in layers]
        return torch.stack([torch.cat(pair, dim=-1) for pair in pairs])

    return Cache(list(layers), LayoutKind.AS_SHAPED, read)


def split_tuple(logical: Tensor) -> Cache:
    """Ascend: (K, V), each [B, N, H, d]."""
    layers = _apart(logical, logical.shape[-1] // 2)

    def read() -> Tensor:
        return torch.stack([torch.cat(x, dim=-1).transpose(1, 2) for x in layers])

    return Cache(list(layers), LayoutKind.AS_SHAPED, read)


def packed_by_token(logical: Tensor) -> Cache:
    """CUDA until 0.25, keys and values of unlike sizes: [B, N, H, K|V]."""
    stored = logical.transpose(2, 3).contiguous()
    return Cache(
        list(stored.unbind(0)), LayoutKind.AS_SHAPED, lambda: stored.transpose(2, 3).clone()
    )


def latent(logical: Tensor) -> Cache:
    """MLA, [B, N, C]."""
    layers = [x[:, 0].clone() for x in logical]
    return Cache(list(layers), LayoutKind.AS_SHAPED, lambda: torch.stack(layers).unsqueeze(2))


def latent_with_head(logical: Tensor) -> Cache:
    """MLA, [B, 1, N, C]."""
    stored = logical.clone()
    return Cache(list(stored.unbind(0)), LayoutKind.AS_SHAPED, stored.clone)


def latent_with_head_last(logical: Tensor) -> Cache:
    """MLA, [B, N, 1, C]."""
    stored = logical.transpose(2, 3).contiguous()
    return Cache(
        list(stored.unbind(0)), LayoutKind.AS_SHAPED, lambda: stored.transpose(2, 3).clone()
    )


def latent_tuple(logical: Tensor) -> Cache:
    """MLA with the latent and the rope part apart, each [B, N, 1, c], and the latter as it is."""
    layers = _apart(logical, logical.shape[-1] * 8 // 9)

    def read() -> Tensor:
        return torch.stack([torch.cat(x, dim=-1).transpose(1, 2) for x in layers])

    return Cache(list(layers), LayoutKind.AS_SHAPED, read)


def rope_halves(logical: Tensor) -> Cache:
    """Ascend's MLA: the same, and of the rope part the even elements before the odd ones."""
    layers = [
        (first, torch.cat([rope[..., ::2], rope[..., 1::2]], dim=-1))
        for first, rope in _apart(logical, logical.shape[-1] * 8 // 9)
    ]

    def read() -> Tensor:
        found = []
        for first, halves in layers:
            rope = torch.stack(halves.chunk(2, dim=-1), dim=-1).flatten(-2)
            found.append(torch.cat([first, rope], dim=-1).transpose(1, 2))
        return torch.stack(found)

    return Cache(list(layers), LayoutKind.ROPE_HALVES, read)


LAYOUTS: dict[str, Callable[[Tensor], Cache]] = {
    **{name: (lambda x, name=name: packed(name, x)) for name in _STRIDE_ORDERS},
    "cpu_vec": cpu_vec,
    "split_tensor": split_tensor,
    "split_in_blocks": split_in_blocks,
    "split_tuple": split_tuple,
}
LATENT_LAYOUTS: dict[str, Callable[[Tensor], Cache]] = {
    "latent": latent,
    "latent_with_head": latent_with_head,
    "latent_with_head_last": latent_with_head_last,
    "latent_tuple": latent_tuple,
    "rope_halves": rope_halves,
}
# Of keys and values of unlike sizes.
UNLIKE_LAYOUTS: dict[str, Callable[[Tensor], Cache]] = {"packed_by_token": packed_by_token}
ALL_LAYOUTS = LAYOUTS | LATENT_LAYOUTS | UNLIKE_LAYOUTS


def geometry_for(layout: str, *, heads: PageGeometry, latent: PageGeometry) -> PageGeometry:
    """One of these, or as large a one with keys three times the size of values."""
    if layout in UNLIKE_LAYOUTS:
        size = heads.content_size // 4
        return replace(heads, k_size=3 * size, v_size=size)
    return latent if layout in LATENT_LAYOUTS else heads


@dataclass(frozen=True)
class Rank:
    """An engine's rank: its cache, its share of the pages, and its block size."""

    cache: Cache
    geometry: PageGeometry
    share: RankShare
    block_tokens: int

    def views(self) -> list[LayerView]:
        return [
            layer_view(
                kv,
                kind=self.cache.kind,
                geometry=self.geometry,
                num_heads=len(self.share.heads),
                block_tokens=self.block_tokens,
            )
            for kv in self.cache.layers
        ]

    def target(self) -> CopyTarget:
        return CopyTarget(self.views(), self.geometry, self.share)


def make_rank(
    layout: str,
    geometry: PageGeometry,
    *,
    tp: tuple[int, int] = (0, 1),
    layers: range | None = None,
    block_tokens: int | None = None,
    num_blocks: int = 8,
    device: torch.device | str = "cpu",
    seed: int | None = None,
) -> Rank:
    """A rank whose cache holds random bits, or zeros without a `seed`."""
    layers = layers or range(geometry.num_layers)
    share = rank_share(geometry, tp_rank=tp[0], tp_size=tp[1], layers=layers)
    tokens = block_tokens or geometry.block_tokens
    shape = (len(layers), num_blocks, len(share.heads), tokens, geometry.content_size)
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[geometry.item_bytes]
    if seed is None:
        logical = torch.zeros(shape, dtype=dtype)
    else:
        generator = torch.Generator().manual_seed(seed)
        low, high = (0, 256) if dtype == torch.uint8 else (-(2**15), 2**15)
        logical = torch.randint(low, high, shape, generator=generator, dtype=dtype)
    return Rank(ALL_LAYOUTS[layout](logical.to(device)), geometry, share, tokens)


def make_arena(num_pages: int, geometry: PageGeometry, device: torch.device | None = None) -> Arena:
    """Slots with other bytes in them, as a node cache's memory would have."""
    fd = os.memfd_create("slots")
    try:
        nbytes = num_pages * geometry.slot_bytes
        os.ftruncate(fd, nbytes)
        arena = Arena(mmap.mmap(fd, nbytes), device=device)
    finally:
        os.close(fd)
    arena.bytes.fill_(0xEE)
    return arena


def page_in(arena: Arena, geometry: PageGeometry, slot: int) -> Tensor:
    """A slot's page as [layer, head, token, content] integers."""
    return page_at(arena.bytes, geometry, slot * geometry.slot_bytes)


def page_at(memory: Tensor, geometry: PageGeometry, start: int) -> Tensor:
    """The page whose slot starts there in an arena's bytes, likewise."""
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[geometry.item_bytes]
    return memory[start : start + geometry.page_bytes].view(dtype).view(geometry.shape)


def page_of_blocks(logical: Tensor, block_ids: Sequence[int]) -> Tensor:
    """What these blocks of a rank are in a page: [layer, head, token, content]."""
    chosen = logical[:, list(block_ids)].cpu()  # [layer, block, head, token, content]
    layers, blocks, heads, tokens, content = chosen.shape
    return chosen.transpose(1, 2).reshape(layers, heads, blocks * tokens, content)


def whole_pages(rank: Rank, slot_blocks: Sequence[Sequence[int]]) -> list[PagePart]:
    """Page i of the arena is made of these blocks."""
    return [
        PagePart(slot * rank.geometry.slot_bytes, 0, tuple(blocks))
        for slot, blocks in enumerate(slot_blocks)
    ]


def only_share(page: Tensor, share: RankShare) -> Tensor:
    layers, heads = share.layers, share.heads
    return page[layers.start : layers.stop : layers.step, heads.start : heads.stop]


def wait_for(engine: CopyEngine, *job_ids: int, timeout_s: float = 60.0) -> None:
    """Until `finished` has named exactly these, none of them failed."""
    wanted, named = sorted(job_ids), list[int]()
    deadline = time.monotonic() + timeout_s
    while len(named) < len(wanted) and time.monotonic() < deadline:
        named += engine.finished()
        time.sleep(0.001)
    assert sorted(named) == wanted
    assert engine.failed() == []


def with_blocks_of(geometry: PageGeometry, block_tokens: int) -> PageGeometry:
    return replace(geometry, block_tokens=block_tokens)
