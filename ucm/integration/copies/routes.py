"""How bytes travel between the blocks on an accelerator and the pages in the slots.

    direct   block and page agree in long runs: each run is one transfer
    staged   otherwise: one gather (a load: scatter) per stack of layers between the blocks and a
             staging buffer in page order, then one transfer per page, or per layer and page if the
             rank holds only some heads, or its layers are no neighbours in the page

A stack is layers of a target that follow each other at one distance in one storage: vLLM 0.32 has
one, older ones have one per layer. Everything here is called by a lane's thread and happens in the
order of its stream.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ucm.integration.copies.arena import Arena
from ucm.integration.copies.copy_engine import first_units
from ucm.integration.copies.jobs import Direction, PagePart
from ucm.integration.copies.placement import PlacedPart, placed_parts
from ucm.integration.copies.ring import Offsets, Transfers
from ucm.integration.copies.target import CopyTarget
from ucm.store.blocks.page_layout import PageGeometry, RankShare


@dataclass(frozen=True)
class RoutePages:
    """What one submission copies of one target. `ids` are the block ids of all parts in order, on
    the device; None if no route of the target has a `staging_bytes`, or no block is copied."""

    parts: Sequence[PagePart]
    arena: Arena
    ids: Tensor | None


class Route(ABC):
    """The way of one stack of layers. `staging_bytes` is what `copy` needs of a lane's buffer."""

    layers: range
    num_blocks: int
    staging_bytes: int = 0

    @abstractmethod
    def copy(self, pages: RoutePages, layers: range, transfers: Transfers, staging: Tensor) -> None:
        """Puts the copies of `layers`, all of this route's or one of them, on the stream."""


def plan_routes(target: CopyTarget, *, staging_bytes: int, direct_run_bytes: int) -> list[Route]:
    geometry, share = target.geometry, target.share
    routes: list[Route] = []
    for _, group in itertools.groupby(placed_parts(target), key=lambda p: p.layers):
        stack = tuple(group)
        if len(stack) == 1 and _runs(stack[0]).nbytes >= direct_run_bytes:
            routes.append(_DirectRoute(stack[0], geometry=geometry))
        else:
            routes.append(
                _StagedRoute(stack, geometry=geometry, share=share, staging_bytes=staging_bytes)
            )
    return routes


@dataclass(frozen=True)
class _Runs:
    """What a block and a page have in common: runs of `nbytes`, with the bytes from the first byte
    of the block, and of its part of the page, to the start of each."""

    nbytes: int
    on_device: Offsets
    in_page: Offsets


def _runs(placed: PlacedPart) -> _Runs:
    tensor = placed.tensor
    item_bytes = tensor.element_size()
    dims = [
        (tensor.shape[dim], tensor.stride(dim), page_stride)
        for dim, page_stride in zip((0, 2, 3, 4), placed.page_strides, strict=True)
        if tensor.shape[dim] > 1
    ]
    run = 1
    while dims and dims[-1][1:] == (run, run):
        run *= dims.pop()[0]
    starts = [
        (
            sum(i * stride for i, (_, stride, _) in zip(index, dims, strict=True)) * item_bytes,
            sum(i * stride for i, (_, _, stride) in zip(index, dims, strict=True)) * item_bytes,
        )
        for index in itertools.product(*(range(size) for size, _, _ in dims))
    ]
    on_device, in_page = np.array(starts, dtype=np.int64).T
    return _Runs(run * item_bytes, on_device, in_page)


class _DirectRoute(Route):
    def __init__(self, placed: PlacedPart, *, geometry: PageGeometry) -> None:
        self.layers = placed.layers
        self.num_blocks = placed.tensor.shape[1]
        self._geometry = geometry
        self._placed = {
            layers: placed.within(layers)
            for layers in (placed.layers, *(range(i, i + 1) for i in placed.layers))
        }
        self._runs = {layers: _runs(part) for layers, part in self._placed.items()}
        storage = placed.tensor.untyped_storage()
        self._storage = torch.empty(0, dtype=torch.uint8, device=placed.tensor.device)
        self._storage.set_(storage, 0, (storage.nbytes(),), (1,))

    def copy(self, pages: RoutePages, layers: range, transfers: Transfers, staging: Tensor) -> None:
        placed, runs = self._placed[layers], self._runs[layers]
        tensor = placed.tensor
        first = int(tensor.storage_offset()) * tensor.element_size()
        stride = tensor.stride(1) * tensor.element_size()
        ids: list[int] = []
        in_slots: list[int] = []
        for part in pages.parts:
            page = part.slot_offset + placed.page_offset_bytes
            units = first_units(part, geometry=self._geometry, block_units=placed.num_units)
            ids += part.block_ids
            in_slots += [page + unit * self._geometry.unit_bytes for unit in units]
        blocks = first + np.array(ids, dtype=np.int64) * stride
        transfers.add(
            self._storage,
            np.add.outer(blocks, runs.on_device).reshape(-1),
            pages.arena,
            np.add.outer(np.array(in_slots, dtype=np.int64), runs.in_page).reshape(-1),
            runs.nbytes,
        )
        transfers.flush()


class _StagedRoute(Route):
    """A staging buffer holds pages as [page][layer][head][unit][content], the target's share."""

    def __init__(
        self,
        stack: tuple[PlacedPart, ...],
        *,
        geometry: PageGeometry,
        share: RankShare,
        staging_bytes: int,
    ) -> None:
        self.layers = stack[0].layers
        self.num_blocks = stack[0].tensor.shape[1]
        self._stack = stack
        self._geometry = geometry
        self._share = share
        self._layer_bytes = len(share.heads) * geometry.head_bytes
        layers = max(1, min(len(self.layers), staging_bytes // self._layer_bytes))
        pages = max(1, staging_bytes // (layers * self._layer_bytes))
        # Of whole int64, the widest item of any part.
        self.staging_bytes = -(-pages * layers * self._layer_bytes // 8) * 8

    def copy(self, pages: RoutePages, layers: range, transfers: Transfers, staging: Tensor) -> None:
        if pages.ids is None:
            return  # no blocks
        device = transfers.device
        at_once = max(1, min(len(layers), staging.numel() // self._layer_bytes))
        for start in range(layers.start, layers.stop, at_once):
            some = range(start, min(start + at_once, layers.stop))
            stack = [placed.within(some) for placed in self._stack]
            max_pages = staging.numel() // (len(some) * self._layer_bytes)
            for batch, ids in _batches(pages.parts, pages.ids, max_pages=max_pages):
                if transfers.direction is Direction.LOAD:
                    self._transfer(batch, some, pages.arena, transfers, staging)
                    for placed in stack:
                        device.scatter(placed.tensor, ids, self._staged(placed, staging, batch))
                else:
                    for placed in stack:
                        device.gather(placed.tensor, ids, self._staged(placed, staging, batch))
                    self._transfer(batch, some, pages.arena, transfers, staging)

    def _units(self, batch: Sequence[PagePart]) -> range:
        return first_units(batch[0], geometry=self._geometry, block_units=self._stack[0].num_units)

    def _staged(self, placed: PlacedPart, staging: Tensor, batch: Sequence[PagePart]) -> Tensor:
        """A part of the staged pages as [layer, page, block in page, head, unit, size]."""
        geometry, share, tensor = self._geometry, self._share, placed.tensor
        item_bytes = tensor.element_size()
        layers, _, heads, units, size = tensor.shape
        first_layer = share.layers[placed.layers.start]
        start = placed.page_offset_bytes - geometry.offset(first_layer, share.heads.start)
        start += self._units(batch).start * geometry.unit_bytes
        _, head, unit, item = placed.page_strides
        layer = self._layer_bytes // item_bytes
        return staging.view(tensor.dtype).as_strided(
            (layers, len(batch), len(batch[0].block_ids), heads, units, size),
            (layer, layers * layer, units * unit, head, unit, item),
            start // item_bytes,
        )

    def _transfer(
        self,
        batch: Sequence[PagePart],
        layers: range,
        arena: Arena,
        transfers: Transfers,
        staging: Tensor,
    ) -> None:
        page_bytes = len(layers) * self._layer_bytes
        staged, in_page, nbytes = self._page_runs(layers, self._units(batch), transfers.direction)
        pages = np.arange(len(batch), dtype=np.int64) * page_bytes
        slots = np.array([part.slot_offset for part in batch], dtype=np.int64)
        transfers.add(
            staging,
            np.add.outer(pages, staged).reshape(-1),
            arena,
            np.add.outer(slots, in_page).reshape(-1),
            nbytes,
        )
        transfers.flush()

    def _page_runs(
        self, layers: range, units: range, direction: Direction
    ) -> tuple[Offsets, Offsets, int]:
        """Runs: their starts in the staged page, their starts in the page, bytes."""
        geometry, heads = self._geometry, self._share.heads
        first = geometry.offset(self._share.layers[layers.start], heads.start)
        in_part = units.stop - units.start
        layer_stride_bytes = self._share.layer_stride_bytes(geometry)
        each_layer = np.arange(len(layers), dtype=np.int64)
        if direction is Direction.DUMP and in_part < geometry.num_units:
            # The rest of the page is another dump's: only these units may be written.
            each_head = np.arange(len(heads), dtype=np.int64) * geometry.head_bytes
            each_head += units.start * geometry.unit_bytes
            return (
                np.add.outer(each_layer * self._layer_bytes, each_head).reshape(-1),
                first + np.add.outer(each_layer * layer_stride_bytes, each_head).reshape(-1),
                in_part * geometry.unit_bytes,
            )
        if self._layer_bytes == layer_stride_bytes:
            whole = np.zeros(1, dtype=np.int64)
            return whole, whole + first, len(layers) * self._layer_bytes
        return (
            each_layer * self._layer_bytes,
            first + each_layer * layer_stride_bytes,
            self._layer_bytes,
        )


def _batches(
    parts: Sequence[PagePart], ids: Tensor, *, max_pages: int
) -> Iterator[tuple[list[PagePart], Tensor]]:
    """Neighbouring parts that lie alike in their pages, at most `max_pages` at a time, each with
    its ids as [part, block]."""
    at = 0
    for (_, num_blocks), group in itertools.groupby(
        parts, key=lambda p: (p.first_token, len(p.block_ids))
    ):
        alike = list(group) if num_blocks else []
        for start in range(0, len(alike), max_pages):
            batch = alike[start : start + max_pages]
            end = at + len(batch) * num_blocks
            yield batch, ids[at:end].view(len(batch), num_blocks)
            at = end
