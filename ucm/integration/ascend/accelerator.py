"""The door to an NPU: what its kernels must not be asked for.

An indexed write into a transposed view copies all of the view, writes, and copies all of it back,
beside a forward pass that writes other blocks meanwhile: their KV would be lost. An indexed read
copies the whole view first. So both are asked of a layer's own tensor, whose memory is without gaps
in the order of its dimensions, and only the blocks that are copied are transposed.

Memory is not registered with the driver here: copies go by way of the pinned ring.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ucm.errors import UnsupportedEngine
from ucm.integration.ascend.engine import is_ascend
from ucm.integration.copies.accelerator import Accelerator
from ucm.integration.copies.target import CopyTarget


class NpuAccelerator(Accelerator):
    """One NPU. Takes blocks whose layers each are without gaps: see `accelerator_for`."""

    def gather(self, blocks: Tensor, ids: Tensor, into: Tensor) -> None:
        """One layer after the other: what lies between is as large as a layer's blocks."""
        for layer, staged in zip(blocks.unbind(0), into.unbind(0), strict=True):
            order = _order(layer)
            found = layer.permute(order)[ids.reshape(-1)]
            staged.copy_(found.permute(_inverse(order)).view(staged.shape))

    def scatter(self, blocks: Tensor, ids: Tensor, out_of: Tensor) -> None:
        for layer, staged in zip(blocks.unbind(0), out_of.unbind(0), strict=True):
            order = _order(layer)
            layer.permute(order)[ids.reshape(-1)] = staged.flatten(0, 1).permute(order).contiguous()


def accelerator_for(targets: Sequence[CopyTarget]) -> Accelerator | None:
    """None: any other device. Raises UnsupportedEngine for blocks that it can't be asked for."""
    device = targets[0].views[0].parts[0].device
    if not is_ascend(device.type):
        return None
    refuse_gaps(targets)
    return NpuAccelerator(device)


def refuse_gaps(targets: Sequence[CopyTarget]) -> None:
    for target in targets:
        for number, view in zip(target.share.layers, target.views, strict=True):
            for part in view.parts:
                if not part.permute(_order(part)).is_contiguous():
                    raise UnsupportedEngine(
                        f"the KV cache of layer {number} has parts {list(part.shape)} with strides "
                        f"{list(part.stride())}: an NPU would copy all of it for every block that "
                        "is written"
                    )


def _order(part: Tensor) -> list[int]:
    """The dimensions of [block, head, unit, size] as they lie in memory, blocks first."""
    strides = part.stride()
    return [0, *sorted(range(1, part.dim()), key=lambda dim: -strides[dim])]


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(dim) for dim in range(len(order))]
