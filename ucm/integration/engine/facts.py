"""What UCM needs to know about an engine, whichever it is."""

from __future__ import annotations

from dataclasses import dataclass

from ucm.integration.copies.layout_kind import LayoutKind
from ucm.store.blocks.page_layout import PageGeometry


@dataclass(frozen=True)
class EngineFacts:
    """One engine. `layer_names` are the attention layers of this process in order: all of them, or
    with pipeline parallelism a stage's. `loads` and `dumps` follow from kv_role; an engine that
    could not use a hit (`why_no_hits` says why) loads nothing. `adapter_rules` is what of its
    settings decides how a LoRA adapter is applied, empty for vLLM's defaults."""

    engine_id: str
    loads: bool
    dumps: bool
    world_size: int
    tp_size: int
    pp_size: int
    block_tokens: int
    num_blocks: int
    max_step_tokens: int
    layer_names: tuple[str, ...]
    layout: LayoutKind
    layout_name: str
    geometry: PageGeometry
    why_no_hits: str = ""
    adapter_rules: str = ""
    can_sleep: bool = False
