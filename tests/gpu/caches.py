"""The caches of the accelerator tests."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.integration.copies.kv_layouts import Rank, geometry_for, make_rank
from ucm.integration.copies.copy_engine import CopyEngine
from ucm.integration.copies.jobs import Direction
from ucm.store.blocks.page_layout import PageGeometry

# Runs of a layer are 512 KiB, so the layouts that agree with the page are copied directly.
HEADS = PageGeometry(
    num_layers=4, num_kv_heads=8, block_tokens=128, k_size=128, v_size=128, item_bytes=2
)
LATENT = PageGeometry(
    num_layers=4, num_kv_heads=1, block_tokens=128, k_size=576, v_size=0, item_bytes=2
)
LOAD, DUMP = Direction.LOAD, Direction.DUMP
PAGES = 6

MakeEngine = Callable[..., CopyEngine]


def rank_of(layout: str, device: torch.device, **more) -> Rank:
    geometry = geometry_for(layout, heads=HEADS, latent=LATENT)
    return make_rank(layout, geometry, device=device, **more)
