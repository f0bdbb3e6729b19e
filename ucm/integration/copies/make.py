"""Which copy engine fits a device."""

from __future__ import annotations

from collections.abc import Sequence

from ucm.integration.copies.accelerator import BatchedCopy
from ucm.integration.copies.copy_engine import CopyEngine
from ucm.integration.copies.device import STAGING_BYTES, CopyLimits, DeviceCopyEngine
from ucm.integration.copies.host import HostCopyEngine
from ucm.integration.copies.layout import LayerView
from ucm.integration.copies.target import CopyTarget
from ucm.store.blocks.page_layout import PageGeometry, RankShare


def make_copy_engine(
    views: Sequence[LayerView],
    *,
    geometry: PageGeometry,
    share: RankShare,
    engine_block_tokens: int,
    batched: BatchedCopy | None = None,
    staging_bytes: int = STAGING_BYTES,
) -> CopyEngine:
    """`make_engine_of` one target, whose blocks must be of `engine_block_tokens`."""
    target = CopyTarget(views, geometry, share)
    if target.block_tokens != engine_block_tokens:
        raise ValueError(f"views of {target.block_tokens} tokens, blocks of {engine_block_tokens}")
    return make_engine_of([target], batched=batched, staging_bytes=staging_bytes)


def make_engine_of(
    targets: Sequence[CopyTarget],
    *,
    batched: BatchedCopy | None = None,
    staging_bytes: int = STAGING_BYTES,
) -> CopyEngine:
    """The engine for the device that the targets are on. `batched` is the serving engine's own call
    for many copies at once, if it has one."""
    if targets[0].views[0].parts[0].device.type == "cpu":
        return HostCopyEngine(targets)
    limits = CopyLimits(staging_bytes=staging_bytes)
    return DeviceCopyEngine(targets, batched=batched, limits=limits)
