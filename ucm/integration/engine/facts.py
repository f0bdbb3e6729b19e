"""What UCM needs to know about an engine, whichever it is."""

from __future__ import annotations

from dataclasses import dataclass

from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.copies.state_field import StateField
from ucm.store.blocks.page_layout import PageGeometry
from ucm.store.blocks.strands import ALL, STATE, Reach, interval_tokens


@dataclass(frozen=True)
class StrandFacts:
    """Layers that need the same part of a prompt and have KV of one shape: a page of `geometry` per
    block. `name` is part of the keys of its pages; that of the first strand is empty. `layer_names`
    are in the page's order. A page of states is raw bytes by its `geometry`; `fields` are what is
    in it."""

    name: str
    reach: Reach
    geometry: PageGeometry
    layout: LayoutKind
    layout_name: str
    layer_names: tuple[str, ...]
    fields: tuple[StateField, ...] = ()

    @property
    def has_states(self) -> bool:
        return self.reach == STATE


@dataclass(frozen=True)
class TargetFacts:
    """Layers of one strand in one group of the engine, both by their numbers. A group's blocks, of
    `block_tokens`, have ids of their own. The layers have `positions` in the strand's page. Of
    states it is one `field` of these layers."""

    strand: int
    group: int
    block_tokens: int
    layer_names: tuple[str, ...]
    positions: range
    field: StateField | None = None

    @property
    def page_offset_bytes(self) -> int:
        """In the strand's page, where what `positions` count begins."""
        return self.field.page_offset_bytes if self.field is not None else 0


@dataclass(frozen=True)
class EngineFacts:
    """One engine. `layer_names` are the attention layers of this process in order: all of them, or
    with pipeline parallelism a stage's. `loads` and `dumps` follow from kv_role; an engine that
    could not use a hit (`why_no_hits` says why) loads nothing. `adapter_rules` is what of its
    settings decides how a LoRA adapter is applied, empty for vLLM's defaults, and `encoder_rules`
    what of them decides how pictures and the like become KV.

    `strands` and `targets` are what there is to store and where it lies. Most models have one each,
    and the fields above them describe it (it need not be given of an engine with one stage). Of a
    model with several they describe the first one: the base strand, of which every block is kept,
    or where all layers have windows the one with the longest.

    `state_interval_tokens` is how far apart an engine keeps states in its own cache, 0 for the ends
    of prompts only: it keeps none for us alone."""

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
    encoder_rules: str = ""
    can_sleep: bool = False
    strands: tuple[StrandFacts, ...] = ()
    targets: tuple[TargetFacts, ...] = ()
    state_interval_tokens: int = 0

    def __post_init__(self) -> None:
        layers = self.layer_names
        if not self.strands:
            base = StrandFacts("", ALL, self.geometry, self.layout, self.layout_name, layers)
            object.__setattr__(self, "strands", (base,))
        if not self.targets:
            only = TargetFacts(0, 0, self.block_tokens, layers, range(len(layers)))
            object.__setattr__(self, "targets", (only,))

    @property
    def has_base(self) -> bool:
        """A strand needs every token, so a hit begins with those."""
        return self.strands[0].reach == ALL

    @property
    def is_plain(self) -> bool:
        """Every block of all that is stored is needed, so a hit may end anywhere."""
        return all(strand.reach == ALL for strand in self.strands)

    @property
    def has_states(self) -> bool:
        return any(strand.has_states for strand in self.strands)

    def geometry_of(self, target: TargetFacts) -> PageGeometry:
        """That which its `positions` count in."""
        if target.field is not None:
            return target.field.geometry
        return self.strands[target.strand].geometry

    def interval_tokens(self, window_interval: int | None) -> int:
        """How far apart boundaries are, by that setting."""
        return interval_tokens(
            [strand.reach for strand in self.strands],
            window_interval=window_interval,
            state_interval_tokens=self.state_interval_tokens,
        )
