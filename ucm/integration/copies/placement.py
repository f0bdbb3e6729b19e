"""Where the parts of a rank's layers lie in a page. Nothing is copied here.

Layers that lie at one distance in one storage are joined, so that a block of all layers is a single
strided tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ucm.integration.copies.layout import INTEGER_OF_BYTES, ContentPlace, LayerView
from ucm.integration.copies.target import CopyTarget
from ucm.store.blocks.page_layout import PageGeometry


@dataclass(frozen=True)
class PlacedPart:
    """One part of layers that follow each other in a target, and where it lies in a page.

    `tensor` is [layer, block, head, unit, size]; `layers` are positions in the target's share.
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


def placed_parts(target: CopyTarget) -> tuple[PlacedPart, ...]:
    """All parts of all layers of a target, joined over layers where their strides allow it."""
    views, geometry, share = target.views, target.geometry, target.share
    layer_bytes = share.layer_stride_bytes(geometry)
    placed: list[PlacedPart] = []
    start = 0
    while start < len(views):
        end = start + 1
        while end < len(views) and _joins(views, start, end):
            end += 1
        layers = range(start, end)
        first = geometry.offset(share.layers[start], share.heads.start)
        for index, place in enumerate(views[start].places):
            joined = _join([view.parts[index] for view in views[start:end]])
            tensor = _widest(joined, geometry, place)
            item_bytes = tensor.element_size()
            head_bytes = place.piece_step * geometry.item_bytes or geometry.head_bytes
            placed.append(
                PlacedPart(
                    layers=layers,
                    tensor=tensor,
                    page_offset_bytes=first + place.first * geometry.item_bytes,
                    page_strides=(
                        layer_bytes // item_bytes,
                        head_bytes // item_bytes,
                        geometry.unit_bytes // item_bytes,
                        place.step,
                    ),
                )
            )
        start = end
    return tuple(placed)


def _joins(views: Sequence[LayerView], start: int, layer: int) -> bool:
    """Whether `layer` continues the layers from `start`: one storage, one form, one distance."""
    first, second, before, this = (views[i].parts for i in (start, start + 1, layer - 1, layer))
    step = second[0].storage_offset() - first[0].storage_offset()
    if step <= 0 or views[layer].places != views[start].places:
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


def _widest(tensor: Tensor, geometry: PageGeometry, place: ContentPlace) -> Tensor:
    """The same bytes as the widest integers that all strides, here and in the page, allow. What is
    not side by side in the page keeps its items."""
    item_bytes = tensor.element_size()
    numbers = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    in_bytes = [n * item_bytes for n in numbers]
    in_bytes += [tensor.data_ptr(), place.first * geometry.item_bytes, geometry.unit_bytes]
    for width in (8, 4, 2):
        if width <= item_bytes or tensor.stride(-1) != 1 or place.step != 1:
            break
        if all(n % width == 0 for n in in_bytes):
            return tensor.view(INTEGER_OF_BYTES[width])
    return tensor
