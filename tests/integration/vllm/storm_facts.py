"""What a storm's connector knows of its engine: a layer of each reach, in a group of its own."""

from __future__ import annotations

from tests.integration.vllm.storm_device import UNIT
from tests.integration.vllm.storm_engine import Weather
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.copies.state_field import StateField
from ucm.integration.engine.facts import EngineFacts, StrandFacts, TargetFacts
from ucm.store.blocks.page_layout import PageGeometry
from ucm.store.blocks.strands import STATE, Reach

# As large as the others' pages, of one unit: there are no tails of it.
_STATES = PageGeometry(
    num_layers=1,
    num_kv_heads=1,
    block_tokens=UNIT,
    k_size=64 * UNIT,
    v_size=64 * UNIT,
    item_bytes=2,
    unit_tokens=UNIT,
)


def storm_facts(weather: Weather, geometry: PageGeometry) -> EngineFacts:
    reaches = weather.reaches
    return EngineFacts(
        engine_id="e",
        loads=weather.role != "kv_producer",
        dumps=weather.role != "kv_consumer",
        world_size=weather.world_size,
        tp_size=weather.world_size,
        pp_size=1,
        block_tokens=UNIT,
        num_blocks=weather.num_blocks,
        max_step_tokens=weather.step_tokens,
        layer_names=("layers.0",),
        layout=LayoutKind.AS_SHAPED,
        layout_name="",
        geometry=geometry,
        strands=tuple(
            StrandFacts(
                f"{group or ''}",
                reach,
                _STATES if reach == STATE else geometry,
                LayoutKind.AS_SHAPED,
                "",
                (f"layers.{group}",),
            )
            for group, reach in enumerate(reaches)
        ),
        targets=tuple(
            TargetFacts(group, group, UNIT, (f"layers.{group}",), range(1), _field(reach))
            for group, reach in enumerate(reaches)
        ),
        state_interval_tokens=weather.state_interval_tokens,
    )


def _field(reach: Reach) -> StateField | None:
    return StateField("s", _STATES, 0, 0, (1, 1, 1), "") if reach == STATE else None
