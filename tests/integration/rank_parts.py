"""What a rank's worker side needs around it in tests: facts of an engine, and memory without a node
cache."""

from __future__ import annotations

import os

from ucm.config.settings import StoreSettings
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.engine.facts import EngineFacts
from ucm.store.blocks.page_layout import PageGeometry
from ucm.store.node import protocol as p

GEOMETRY = PageGeometry(
    num_layers=3, num_kv_heads=4, block_tokens=32, k_size=16, v_size=16, item_bytes=2
)
NUM_BLOCKS = 16
BLOCK_TOKENS = 8
NUM_SLOTS = 4
LAYERS = ("layers.0", "layers.1", "layers.2")


def facts_of(*, tp_size: int = 1, can_sleep: bool = False) -> EngineFacts:
    return EngineFacts(
        engine_id="e",
        loads=True,
        dumps=True,
        world_size=tp_size,
        tp_size=tp_size,
        pp_size=1,
        block_tokens=BLOCK_TOKENS,
        num_blocks=NUM_BLOCKS,
        max_step_tokens=64,
        layer_names=LAYERS,
        layout=LayoutKind.AS_SHAPED,
        layout_name="",
        geometry=GEOMETRY,
        can_sleep=can_sleep,
    )


class FakeLink:
    """Brings a few slots of memory at once."""

    def __init__(self, settings: StoreSettings, *, engine_id: str, on_memory) -> None:
        self._on_memory = on_memory

    def start(self) -> None:
        capacity_bytes = NUM_SLOTS * GEOMETRY.slot_bytes
        fd = os.memfd_create("slots")
        os.ftruncate(fd, capacity_bytes)
        welcome = p.Welcome(version=p.VERSION, arena="a", capacity_bytes=capacity_bytes, pid=1)
        self._on_memory.memory_arrived(0, fd, welcome)
        os.close(fd)

    def follow(self, generation: int) -> None:
        pass

    def close(self) -> None:
        pass
