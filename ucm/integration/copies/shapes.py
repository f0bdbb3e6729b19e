"""Which layout the tensors of a layer have, told by their shapes and by nothing else.

    K and V in one tensor    [B, H, N, K|V], any strides; if their sizes are unlike also
                             [B, N, H, K|V]
    apart in one tensor      [2, B, N, H, d] or [B, 2, N, H, d]
    apart in two             (K, V), each [B, N, H, d]
    MLA                      [B, N, C], [B, 1, N, C] or [B, N, 1, C]; or two of these that share C,
                             the latent before the rope part, which is the smaller one

B are blocks, H this rank's heads, N the units of a block. What fits none of these, or two, nobody
can tell: the caller refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ucm.store.blocks.page_layout import PageGeometry


@dataclass(frozen=True)
class RankBlock:
    """What a block of this rank has to hold, whatever its layout."""

    geometry: PageGeometry
    num_heads: int
    num_units: int

    def holds(self, parts: Sequence[Tensor]) -> bool:
        """Parts are [block, head, unit, size]: K and V together, or each for itself; of MLA any
        number that share the latent."""
        geometry, sizes = self.geometry, [part.shape[3] for part in parts]
        apart = [geometry.k_size, geometry.v_size]
        return (
            all(tuple(part.shape[1:3]) == (self.num_heads, self.num_units) for part in parts)
            and len({part.shape[0] for part in parts}) == 1
            and sum(sizes) == geometry.content_size
            and (len(parts) == 1 or not geometry.v_size or sizes == apart)
        )


def readings(tensors: Sequence[Tensor], block: RankBlock) -> list[tuple[Tensor, ...]]:
    """Every way to read them as parts [block, head, unit, size], K before V: by rights one."""
    reading = _of_heads(tensors, block.geometry) if block.geometry.v_size else _of_latents(tensors)
    return [parts for parts in reading if block.holds(parts)]


def num_blocks_of(tensors: Sequence[Tensor]) -> int:
    first = tensors[0]
    return int(first.shape[1 if first.dim() == 5 and first.shape[0] == 2 else 0])


def shapes_text(tensors: Sequence[Tensor]) -> str:
    shapes = [str(list(each.shape)) for each in tensors]
    return shapes[0] if len(shapes) == 1 else f"({', '.join(shapes)})"


def _of_heads(tensors: Sequence[Tensor], geometry: PageGeometry) -> Iterator[tuple[Tensor, ...]]:
    ranks = [each.dim() for each in tensors]
    if ranks == [4]:
        yield (tensors[0],)
        if geometry.k_size != geometry.v_size:
            yield (tensors[0].transpose(1, 2),)
    if ranks == [4, 4]:
        yield tuple(each.transpose(1, 2) for each in tensors)
    if ranks == [5]:
        for dim in (0, 1):
            if tensors[0].shape[dim] == 2:
                yield tuple(each.transpose(1, 2) for each in tensors[0].unbind(dim))


def _of_latents(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The one head may be first, last, or left out."""
    parts: list[Tensor] = []
    for each in tensors:
        if each.dim() == 3:
            parts.append(each.unsqueeze(1))
        elif each.dim() == 4 and 1 in each.shape[1:3]:
            parts.append(each if each.shape[1] == 1 else each.transpose(1, 2))
    sizes = [part.shape[3] for part in parts]
    if len(parts) == len(tensors) in (1, 2) and sizes == sorted(sizes, reverse=True):
        yield tuple(parts)
