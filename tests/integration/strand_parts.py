"""Facts of engines whose models are more than full attention of one kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.copies.state_field import StateField
from ucm.integration.engine.facts import StrandFacts, TargetFacts
from ucm.store.blocks.page_layout import PageGeometry
from ucm.store.blocks.strands import ALL, STATE, Reach, ReachKind

BLOCK = 16
GEOMETRY = PageGeometry(
    num_layers=1, num_kv_heads=1, block_tokens=BLOCK, k_size=64, v_size=64, item_bytes=2
)


def two_strands(window: int) -> dict[str, Any]:
    """Facts of an engine whose second group has a window, in smaller pages."""
    kind = LayoutKind.AS_SHAPED
    side = PageGeometry(
        num_layers=1, num_kv_heads=1, block_tokens=BLOCK, k_size=16, v_size=16, item_bytes=2
    )
    return {
        "strands": (
            StrandFacts("", ALL, GEOMETRY, kind, "", ("layers.0",)),
            StrandFacts("w", Reach(ReachKind.WINDOW, window), side, kind, "", ("layers.1",)),
        ),
        "targets": (
            TargetFacts(0, 0, BLOCK, ("layers.0",), range(1)),
            TargetFacts(1, 1, BLOCK, ("layers.1",), range(1)),
        ),
    }


def with_indexer() -> dict[str, Any]:
    """Facts of an engine whose layers have two kinds of pages, all of which are needed."""
    window = two_strands(1)
    base, side = window["strands"]
    of_base, of_side = window["targets"]
    return {
        "strands": (base, replace(side, name="i", reach=ALL)),
        "targets": (of_base, replace(of_side, group=0)),
    }


def windows_only(window: int, other: int) -> dict[str, Any]:
    """Facts of an engine whose two groups both have windows, in pages of one size."""
    kind = LayoutKind.AS_SHAPED
    return {
        "strands": tuple(
            StrandFacts(name, Reach(ReachKind.WINDOW, size), GEOMETRY, kind, "", (f"layers.{i}",))
            for i, (name, size) in enumerate((("", window), ("w", other)))
        ),
        "targets": tuple(TargetFacts(i, i, BLOCK, (f"layers.{i}",), range(1)) for i in range(2)),
    }


def with_states() -> dict[str, Any]:
    """Facts of an engine with states in two groups beside the first, each in two fields."""
    of_field = PageGeometry(
        num_layers=2, num_kv_heads=1, block_tokens=1, k_size=64, v_size=0, item_bytes=2
    )
    page = PageGeometry(
        num_layers=1,
        num_kv_heads=1,
        block_tokens=BLOCK,
        k_size=of_field.slot_bytes + of_field.page_bytes,
        v_size=0,
        item_bytes=1,
        unit_tokens=BLOCK,
    )
    fields = tuple(
        StateField(name, of_field, offset, 0, (64, 64, 1), "bfloat16")
        for name, offset in (("conv.x", 0), ("recurrent", of_field.slot_bytes))
    )
    layers = ("layers.1", "layers.2")
    return {
        "strands": (
            StrandFacts("", ALL, GEOMETRY, LayoutKind.AS_SHAPED, "", ("layers.0",)),
            StrandFacts("s", STATE, page, LayoutKind.STATE, "", layers, fields),
        ),
        "targets": (
            TargetFacts(0, 0, BLOCK, ("layers.0",), range(1)),
            *(
                TargetFacts(1, 1 + i, BLOCK, (layer,), range(i, i + 1), field)
                for i, layer in enumerate(layers)
                for field in fields
            ),
        ),
    }


def with_windows(window: int | None, base_window: int | None) -> dict[str, Any]:
    if window is None:
        return {}
    return two_strands(window) if base_window is None else windows_only(base_window, window)
