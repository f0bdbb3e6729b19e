"""Which copy engine fits a device."""

from __future__ import annotations

from collections.abc import Sequence

from ucm.integration.copies.accelerator import BatchedCopy
from ucm.integration.copies.copy_engine import CopyEngine
from ucm.integration.copies.device import STAGING_BYTES, CopyLimits, DeviceCopyEngine
from ucm.integration.copies.host import HostCopyEngine
from ucm.integration.copies.layout import LayerView
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
    """The engine for the device that the views are on. `views` are in the order of `share.layers`.
    `batched` is the engine's own call for many copies at once, if it has one."""
    block_tokens = {view.num_units * geometry.unit_tokens for view in views}
    if block_tokens != {engine_block_tokens}:
        raise ValueError(f"views of {sorted(block_tokens)} tokens, blocks of {engine_block_tokens}")
    if views[0].parts[0].device.type == "cpu":
        return HostCopyEngine(views, geometry=geometry, share=share)
    return DeviceCopyEngine(
        views,
        geometry=geometry,
        share=share,
        batched=batched,
        limits=CopyLimits(staging_bytes=staging_bytes),
    )
