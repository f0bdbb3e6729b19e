"""Which strands a model has, and in which of the engine's groups their layers are.

The layers with one reach and one shape are a strand; where they lie in its pages follows from their
numbers in the model. So engines whose groups differ have the same pages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ucm.config.settings import Settings
from ucm.errors import UnsupportedEngine
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.engine.facts import StrandFacts, TargetFacts
from ucm.integration.vllm.identity import draft_with_kv
from ucm.integration.vllm.kv_specs import CachedLayer, layer_index
from ucm.integration.vllm.state_layout import state_fields, state_kind
from ucm.integration.vllm.strand_layout import (
    geometry_of,
    geometry_of_raw_blocks,
    layout_of,
    name_of_raw_blocks,
)
from ucm.store.blocks.page_layout import PageGeometry
from ucm.store.blocks.strands import ALL, STATE, Reach, ReachKind


def read_strands(
    vllm_config: Any, layers: Sequence[CachedLayer], settings: Settings
) -> tuple[tuple[StrandFacts, ...], tuple[TargetFacts, ...]]:
    """The base strand comes first, or that with the longest window. Raises UnsupportedEngine."""
    _refuse_promoted_sinks(vllm_config, layers)
    _refuse_staged_drafts(vllm_config)
    sharing = _sharing(vllm_config, layers, settings)
    kinds = {(layer.group, layer.reach) for layer in layers}
    if len(sharing) > 1 or len(kinds) > 1 or sharing[0][0].reach != ALL:
        _refuse_with_others(vllm_config, settings, sharing)
    # First: what it says is more to the point.
    _refuse_blocks_without_states(settings, layers)
    _refuse_unlike_blocks(settings, layers)
    strands: list[StrandFacts] = []
    targets: list[TargetFacts] = []
    for of_strand in sharing:
        is_first = not strands
        strands.append(
            _strand(vllm_config, of_strand, settings, is_first=is_first, is_only=len(sharing) == 1)
        )
        first = _first_position(vllm_config, of_strand)
        for target in _targets(len(strands) - 1, of_strand, first):
            fields = strands[-1].fields
            targets += [replace(target, field=field) for field in fields] if fields else [target]
    assert len({strand.name for strand in strands}) == len(strands), "two strands have one name"
    return tuple(strands), tuple(targets)


def _sharing(
    vllm_config: Any, layers: Sequence[CachedLayer], settings: Settings
) -> list[list[CachedLayer]]:
    """The layers of each strand in the order of the model. First those of which every block is
    kept, or of which most are."""
    in_one_group = len({layer.group for layer in layers}) == 1
    # Those of one number are in the engine's order, or, where groups mix it up, in that of names.
    in_engines_order = in_one_group and not any(layer.block_bytes for layer in layers)
    ordered = sorted(
        layers, key=lambda layer: (layer_index(layer.name), "" if in_engines_order else layer.name)
    )
    strands: dict[tuple[object, ...], list[CachedLayer]] = {}
    for layer in ordered:
        spec = layer.spec
        if layer.reach == STATE:
            of_state = (STATE, spec.shapes, spec.dtypes, state_kind(spec))
            strands.setdefault(of_state, []).append(layer)
            continue
        if layer.block_bytes:
            strands.setdefault((ALL, layer.block_bytes), []).append(layer)
            continue
        shape = (type(spec) if layer.reach == ALL else None, int(spec.num_kv_heads))
        sizes = (int(spec.head_size), int(spec.head_size_v), str(spec.dtype))
        kind = (layer.reach, shape, sizes, layout_of(vllm_config, spec, settings))
        strands.setdefault(kind, []).append(layer)
    found = list(strands.values())
    first = max(found, key=lambda each: (_extent(each[0].reach), each[0].block_bytes))
    has_states = any(each[0].reach == STATE for each in found)
    if first[0].reach != ALL and (has_states or not _extent(first[0].reach)):
        raise UnsupportedEngine(
            f"no layer of this model attends to the whole prompt ({_kinds(found)}), and UCM needs "
            "one beside chunks or states: run it without UCM"
        )
    return [first, *(each for each in found if each is not first)]


def _extent(reach: Reach) -> float:
    """How much of every prompt is kept. Behind a whole chunk nothing is, and of a window of one
    token neither: with these alone nobody could tell where a stored prompt ends."""
    if reach == ALL:
        return math.inf
    return reach.num_tokens - 1 if reach.kind is ReachKind.WINDOW else 0


def _strand(
    vllm_config: Any,
    layers: Sequence[CachedLayer],
    settings: Settings,
    *,
    is_first: bool,
    is_only: bool,
) -> StrandFacts:
    spec, reach = layers[0].spec, layers[0].reach
    if reach == STATE:
        return _of_states(vllm_config, layers, settings)
    if layers[0].block_bytes:
        layout, layout_name = LayoutKind.OPAQUE, name_of_raw_blocks(spec)
        geometry = geometry_of_raw_blocks(
            settings, spec, num_layers=len(layers), num_heads=1, block_bytes=layers[0].block_bytes
        )
    else:
        layout, layout_name = layout_of(vllm_config, spec, settings)
        geometry = geometry_of(
            vllm_config,
            spec,
            settings,
            layout,
            layer=layer_index(layers[0].name),
            num_layers=_num_layers(vllm_config, layers),
            is_only=is_only,
        )
    if reach.kind is ReachKind.CHUNK and reach.num_tokens % settings.block_tokens:
        raise UnsupportedEngine(
            f"block_tokens is {settings.block_tokens}, and this model attends in chunks of "
            f"{reach.num_tokens} tokens: set block_tokens to a number that divides them"
        )
    return StrandFacts(
        name="" if is_first else _name(reach, geometry),
        reach=reach,
        geometry=geometry,
        layout=layout,
        layout_name=layout_name,
        layer_names=tuple(layer.name for layer in layers),
    )


def _of_states(vllm_config: Any, layers: Sequence[CachedLayer], settings: Settings) -> StrandFacts:
    spec = layers[0].spec
    fields = state_fields(vllm_config, spec, num_layers=len(layers))
    last = fields[-1]
    geometry = PageGeometry(
        num_layers=1,
        num_kv_heads=1,
        block_tokens=settings.block_tokens,
        k_size=last.page_offset_bytes + last.geometry.page_bytes,
        v_size=0,
        item_bytes=1,
        unit_tokens=settings.block_tokens,
    )
    content = "+".join(
        f"{'x'.join(map(str, field.geometry.shape[1:]))}:{field.dtype}" for field in fields
    )
    return StrandFacts(
        name=f"{STATE}/{state_kind(spec).lower()}/{content}",
        reach=STATE,
        geometry=geometry,
        layout=LayoutKind.STATE,
        layout_name="",
        layer_names=tuple(layer.name for layer in layers),
        fields=fields,
    )


def _name(reach: Reach, geometry: PageGeometry) -> str:
    """What tells one strand of a model from the others, and the same in every engine: keys are made
    with it."""
    where = f"{reach}".replace(" ", "-")
    content = f"{geometry.num_kv_heads}x{geometry.k_size}+{geometry.v_size}"
    unit = f"/{geometry.unit_tokens}" if geometry.unit_tokens > 1 else ""
    return f"{where}/{content}/{geometry.item_bytes}{unit}"


def _num_layers(vllm_config: Any, layers: Sequence[CachedLayer]) -> int:
    if vllm_config.parallel_config.pipeline_parallel_size == 1:
        return len(layers)
    return int(vllm_config.model_config.hf_text_config.num_hidden_layers)


def _first_position(vllm_config: Any, layers: Sequence[CachedLayer]) -> int:
    """In the page of a whole model, where this stage's layers begin."""
    is_stage = vllm_config.parallel_config.pipeline_parallel_size > 1
    return layer_index(layers[0].name) if is_stage else 0


def _targets(strand: int, layers: Sequence[CachedLayer], first: int) -> Iterator[TargetFacts]:
    by_group: dict[int, list[int]] = {}
    for position, layer in enumerate(layers):
        by_group.setdefault(layer.group, []).append(position)
    for group, positions in sorted(by_group.items()):
        for run in _runs(positions):
            yield TargetFacts(
                strand=strand,
                group=group,
                block_tokens=int(layers[run[0]].spec.block_size),
                layer_names=tuple(layers[position].name for position in run),
                positions=range(first + run.start, first + run.stop, run.step),
            )


def _runs(positions: Sequence[int]) -> Iterator[range]:
    """Rising numbers as ranges, as few as they are where each lies one step behind the other."""
    start = 0
    while start < len(positions):
        rest = positions[start:]
        step = rest[1] - rest[0] if len(rest) > 1 else 1
        count = 1
        while count < len(rest) and rest[count] == rest[0] + count * step:
            count += 1
        yield range(rest[0], rest[count - 1] + 1, step)
        start += count


def _refuse_with_others(
    vllm_config: Any, settings: Settings, strands: Sequence[Sequence[CachedLayer]]
) -> None:
    """What is for models with full attention of one kind and nothing else."""
    kinds = _kinds(strands)
    if settings.use_layerwise:
        raise UnsupportedEngine(
            f"this model has layers with windows or of several kinds ({kinds}), and use_layerwise "
            "is for models with full attention alone: leave it out"
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise UnsupportedEngine(
            f"this model has layers with windows or of several kinds ({kinds}), which UCM can't "
            "serve in a pipeline yet: use --tensor-parallel-size instead of "
            "--pipeline-parallel-size"
        )
    if settings.kv_layout == "opaque":
        raise UnsupportedEngine(
            f"this model has layers with windows or of several kinds ({kinds}), and kv_layout: "
            "opaque is for models with full attention alone: set it to auto"
        )
    if draft_with_kv(vllm_config) is not None:
        raise UnsupportedEngine(
            f"this model has layers with windows or of several kinds ({kinds}), which UCM can't "
            f"serve with a draft model that keeps KV ({vllm_config.speculative_config.method}) "
            "yet: leave out --speculative-config, or use ngram or suffix in it"
        )


def _refuse_staged_drafts(vllm_config: Any) -> None:
    """A stage's place in the pages follows from the numbers of its layers, and those of a draft
    begin anew, or go on behind the model's last."""
    if vllm_config.parallel_config.pipeline_parallel_size == 1:
        return
    if draft_with_kv(vllm_config) is not None:
        raise UnsupportedEngine(
            f"UCM can't serve a draft model that keeps KV ({vllm_config.speculative_config.method})"
            " in a pipeline: use --tensor-parallel-size instead of --pipeline-parallel-size, or "
            "ngram or suffix in --speculative-config"
        )


def _refuse_unlike_blocks(settings: Settings, layers: Sequence[CachedLayer]) -> None:
    sizes = sorted({int(layer.spec.block_size) for layer in layers})
    common = math.lcm(*sizes)
    if settings.block_tokens % common == 0:
        return
    if len(sizes) == 1:
        raise UnsupportedEngine(
            f"block_tokens is {settings.block_tokens} and the engine's --block-size is "
            f"{common}: UCM's blocks must be a multiple of the engine's"
        )
    fitting = -(-settings.block_tokens // common) * common
    raise UnsupportedEngine(
        f"block_tokens is {settings.block_tokens} and this engine has blocks of "
        f"{' and '.join(map(str, sizes))} tokens: set block_tokens to {fitting} on all instances"
    )


def _refuse_blocks_without_states(settings: Settings, layers: Sequence[CachedLayer]) -> None:
    """vLLM keeps a state at the last end of a block of its own, which need not be one of a larger
    block."""
    sizes = {int(layer.spec.block_size) for layer in layers if layer.reach == STATE}
    if not sizes or sizes == {settings.block_tokens}:
        return
    raise UnsupportedEngine(
        f"block_tokens is {settings.block_tokens}, and this engine keeps the states of its "
        f"linear-attention or Mamba layers every {max(sizes)} tokens: set block_tokens to "
        f"{max(sizes)} on all instances, and --block-size where theirs differ"
    )


def _refuse_promoted_sinks(vllm_config: Any, layers: Sequence[CachedLayer]) -> None:
    """With its hybrid memory manager off, vLLM has one cache for layers with a window and without;
    its CPU kernel for sinks then answers differently from run to run, with UCM or without."""
    from vllm.platforms import current_platform

    config = vllm_config.model_config.hf_text_config
    has_sinks = getattr(config, "model_type", "") == "gpt_oss"
    is_promoted = any(
        getattr(each.spec, "sliding_window", None) for each in layers if each.reach == ALL
    )
    if current_platform.device_type == "cpu" and has_sinks and is_promoted:
        raise UnsupportedEngine(
            "vLLM's answers with this model are not deterministic on a CPU where its hybrid memory "
            "manager is off: leave out --disable-hybrid-kv-cache-manager"
        )


def _kinds(strands: Sequence[Sequence[CachedLayer]]) -> str:
    return ", ".join(f"{each[0].reach}: {len(each)} layers" for each in strands)
