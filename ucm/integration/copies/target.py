"""What a copy engine copies between: layers of a rank, and their part of pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ucm.integration.copies.layout import LayerView
from ucm.store.blocks.page_layout import PageGeometry, RankShare


@dataclass(frozen=True)
class CopyTarget:
    """Layers of a rank that share block ids: those of one cache group. `views` are in the order of
    `share.layers`, and their blocks of one size; their pages, of `geometry`, may have layers of
    other targets too. Raises ValueError for what can't be one."""

    views: Sequence[LayerView]
    geometry: PageGeometry
    share: RankShare

    def __post_init__(self) -> None:
        num_views, num_layers = len(self.views), len(self.share.layers)
        if num_views != num_layers:
            raise ValueError(f"{num_views} layer views for {num_layers} layers")
        block_units = sorted({view.num_units for view in self.views})
        if len(block_units) > 1:
            raise ValueError(f"blocks of {block_units} units have no ids in common")

    @property
    def block_units(self) -> int:
        """Units in one block of the engine's."""
        return self.views[0].num_units

    @property
    def block_tokens(self) -> int:
        return self.block_units * self.geometry.unit_tokens

    @property
    def share_bytes(self) -> int:
        """What is copied of a whole page."""
        return len(self.share.layers) * len(self.share.heads) * self.geometry.head_bytes
