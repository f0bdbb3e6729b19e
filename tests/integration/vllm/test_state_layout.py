"""States of one model are one page for every number of ranks, as vLLM cuts them over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

import torch
from torch import Tensor
from vllm.model_executor.layers.mamba import mamba_utils
from vllm.model_executor.layers.mamba.mamba_mixer2 import mamba_v2_sharded_weight_loader
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator
from vllm.model_executor.model_loader import utils as loader_utils
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum as Kind
from vllm.v1.kv_cache_interface import MambaSpec

from tests.integration.copies.copy_engines import DUMP, ENGINES, LOAD, copy_and_wait
from tests.integration.copies.kv_layouts import make_arena
from ucm.errors import UnsupportedEngine
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.jobs import PagePart
from ucm.integration.copies.layout import state_view
from ucm.integration.copies.state_field import StateField
from ucm.integration.copies.target import CopyTarget
from ucm.integration.vllm import state_layout
from ucm.integration.vllm.state_layout import state_fields
from ucm.store.blocks.page_layout import PageGeometry, rank_share

NUM_LAYERS, NUM_BLOCKS, TAPS, BLOCK = 3, 4, 3, 2
FLOAT, HALF = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Model:
    """`columns`: of the convolution, what vLLM's loader is told of each kind of them, and whether
    every rank has the same. `heads` of the recurrent state, of `rows` x `size`."""

    kind: Kind
    shards: tuple[tuple[int, bool], ...]
    heads: int
    rows: int
    size: int
    dtypes: tuple[torch.dtype, torch.dtype]
    groups: int = 0

    def shapes(self, tp_size: int) -> tuple[tuple[int, ...], ...]:
        """As vLLM computes them."""
        make = MambaStateShapeCalculator
        if self.kind is Kind.MAMBA2:
            return make.mamba2_state_shape(
                tp_size, self.heads * self.rows, self.groups, self.heads, self.rows, self.size, 4
            )
        if self.kind is Kind.GDN_ATTN:
            return make.gated_delta_net_state_shape(
                tp_size, self.groups, self.heads, self.size, self.rows, 4
            )
        return make.mamba1_state_shape(tp_size, self.heads * self.rows, self.size, 4)

    def columns(self, tp_rank: int, tp_size: int) -> Tensor:
        """Which of the model's columns a rank has, by vLLM's loader of their weights."""
        total = sum(count for count, _ in self.shards)
        num_local = sum(count if same else count // tp_size for count, same in self.shards)
        told = [
            (count * tp_size, count * (tp_size - 1), True) if same else (count, 0, False)
            for count, same in self.shards
        ]
        mine = torch.full((num_local,), -1)
        load = mamba_v2_sharded_weight_loader(told, tp_size, tp_rank)
        load(torch.nn.Parameter(mine, requires_grad=False), torch.arange(total))
        assert mine.min() >= 0
        return mine


MODELS = {
    "mamba2": Model(
        Kind.MAMBA2, ((8 * 6, False), (4 * 10, False), (4 * 10, False)), 8, 6, 10, (HALF, FLOAT), 4
    ),
    "mamba2-one-group": Model(
        Kind.MAMBA2, ((8 * 6, False), (10, True), (10, True)), 8, 6, 10, (HALF, HALF), 1
    ),
    "gdn": Model(
        Kind.GDN_ATTN,
        ((4 * 10, False), (4 * 10, False), (8 * 6, False)),
        8,
        6,
        10,
        (HALF, FLOAT),
        4,
    ),
    "mamba1": Model(Kind.MAMBA1, ((8 * 6, False),), 8, 6, 10, (FLOAT, FLOAT)),
}


class Rank:
    """One of `tp_size`: its memory of states, and their fields."""

    def __init__(self, model: Model, tp_rank: int, tp_size: int, patch: pytest.MonkeyPatch) -> None:
        shapes = model.shapes(tp_size)
        spec = MambaSpec(
            block_size=256,
            shapes=shapes,
            dtypes=model.dtypes,
            mamba_type=model.kind,
            mamba_cache_mode="align",
        )
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=tp_size), model_config=None
        )
        of_model = SimpleNamespace(
            get_mamba_state_shape_from_config=lambda given: model.shapes(
                given.parallel_config.tensor_parallel_size
            )
        )
        patch.setattr(loader_utils, "get_model_cls", lambda model_config: of_model)
        self.fields = state_fields(config, spec, num_layers=NUM_LAYERS)
        assert config.parallel_config.tensor_parallel_size == tp_size
        self.model, self.rank, self.tp_size = model, tp_rank, tp_size
        nbytes = spec.state_content_size_bytes
        # As vLLM does it: a layer's pages are as far apart as the largest of all layers.
        memory = torch.randint(0, 127, (NUM_LAYERS, NUM_BLOCKS, nbytes + 192), dtype=torch.int8)
        self.pages = [memory[layer, :, None, None, :nbytes] for layer in range(NUM_LAYERS)]
        self.shapes, self.dtypes = shapes, model.dtypes

    def states(self, layer: int) -> list[Tensor]:
        """As vLLM's layers take them out of a block."""
        pages, offset, found = self.pages[layer][:, 0, 0], 0, []
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            found.append(pages[:, offset : offset + nbytes].view(dtype).view(-1, *shape)[BLOCK])
            offset += nbytes
        return found

    def right(self, layer: int) -> list[Tensor]:
        """What the model's state is, cut for this rank."""
        model = self.model
        columns = model.columns(self.rank, self.tp_size)
        conv = torch.arange(TAPS)[:, None] * 100 + columns + 300 * layer
        if mamba_utils.is_conv_state_dim_first():
            conv = conv.T
        mine = model.heads // self.tp_size
        heads = torch.arange(mine) + self.rank * mine
        rows, size = torch.arange(model.rows)[:, None], torch.arange(model.size)
        recurrent = heads[:, None, None] * 60 + rows * model.size + size + layer
        if model.kind is Kind.GDN_ATTN and state_layout._is_turned("GDN_ATTN"):
            recurrent = recurrent.transpose(1, 2)
        values = (conv, recurrent)
        # Bits, of whatever width: no number is rounded.
        return [
            value.to(torch.int16 if dtype.itemsize == 2 else torch.int32).reshape(shape)
            for value, shape, dtype in zip(values, self.shapes, self.dtypes, strict=True)
        ]

    def fill(self) -> None:
        for layer in range(NUM_LAYERS):
            for state, right in zip(self.states(layer), self.right(layer), strict=True):
                state.view(right.dtype).copy_(right)

    def copy(self, arena: Arena, *, load: bool, by: str = "host") -> None:
        targets, parts = [], []
        for field in self.fields:
            share = rank_share(
                field.geometry,
                tp_rank=self.rank,
                tp_size=self.tp_size,
                layers=range(NUM_LAYERS),
            )
            if load or share.dumps:
                parts.append(PagePart(field.page_offset_bytes, 0, (BLOCK,), target=len(targets)))
            views = [state_view(page, field, num_heads=len(share.heads)) for page in self.pages]
            targets.append(CopyTarget(views, field.geometry, share))
        engine = ENGINES[by](*(SimpleNamespace(target=lambda it=it: it) for it in targets))
        try:
            copy_and_wait(engine, LOAD if load else DUMP, parts, arena)
        finally:
            engine.close()


def page_of(fields: tuple[StateField, ...]) -> PageGeometry:
    last = fields[-1]
    nbytes = last.page_offset_bytes + last.geometry.page_bytes
    return PageGeometry(
        num_layers=1, num_kv_heads=1, block_tokens=1, k_size=nbytes, v_size=0, item_bytes=1
    )


def dumped(model: Model, tp_size: int, patch: pytest.MonkeyPatch) -> Arena:
    ranks = [Rank(model, number, tp_size, patch) for number in range(tp_size)]
    arena = make_arena(1, page_of(ranks[0].fields))
    arena.bytes.zero_()
    for rank in ranks:
        rank.fill()
        rank.copy(arena, load=False)
    return arena


@pytest.mark.parametrize("dims_first", [False, True], ids=["rows-first", "columns-first"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_what_some_ranks_store_others_load(
    name: str, tp_size: int, dims_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[name]
    of_one = dumped(model, 1, monkeypatch)
    monkeypatch.setattr(mamba_utils, "is_conv_state_dim_first", lambda: dims_first)
    of_several = dumped(model, tp_size, monkeypatch)
    assert torch.equal(of_one.bytes, of_several.bytes)

    for number in range(tp_size):
        rank = Rank(model, number, tp_size, monkeypatch)
        before = [page.clone() for page in rank.pages]
        rank.copy(of_one, load=True)
        for layer in range(NUM_LAYERS):
            for state, right in zip(rank.states(layer), rank.right(layer), strict=True):
                assert torch.equal(state.view(right.dtype), right)
            others = [block for block in range(NUM_BLOCKS) if block != BLOCK]
            assert torch.equal(rank.pages[layer][others], before[layer][others])


@pytest.mark.parametrize("by", [name for name in ENGINES if name != "host"])
@pytest.mark.parametrize("name", ["mamba2", "gdn"])
def test_an_accelerator_copies_them_as_well(
    name: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gated delta nets turned as well, though only a CPU does that."""
    of_one = dumped(MODELS[name], 1, monkeypatch)
    rank = Rank(MODELS[name], 1, 2, monkeypatch)
    rank.copy(of_one, load=True, by=by)
    for layer in range(NUM_LAYERS):
        for state, right in zip(rank.states(layer), rank.right(layer), strict=True):
            assert torch.equal(state.view(right.dtype), right)

    again = make_arena(1, page_of(rank.fields))
    again.bytes.copy_(of_one.bytes)
    rank.copy(again, load=False, by=by)
    assert torch.equal(again.bytes, of_one.bytes)


def test_a_cpu_keeps_gated_delta_nets_turned_and_their_page_is_that_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = []
    for turned in (False, True):
        monkeypatch.setattr(state_layout, "_is_turned", lambda kind, turned=turned: turned)
        pages.append(dumped(MODELS["gdn"], 2, monkeypatch).bytes)

    assert torch.equal(*pages)


def test_fields_follow_each_other_and_each_has_its_own_dtype(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = Rank(MODELS["mamba2"], 0, 2, monkeypatch).fields

    assert [field.name for field in fields] == ["conv.x", "conv.B", "conv.C", "recurrent"]
    assert [field.dtype for field in fields] == ["bfloat16"] * 3 + ["float32"]
    ends = [field.page_offset_bytes + field.geometry.slot_bytes for field in fields]
    assert [field.page_offset_bytes for field in fields] == [0, *ends[:-1]]
    assert {field.geometry.num_layers for field in fields} == {NUM_LAYERS}


def test_states_that_vllm_does_not_describe_over_ranks_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that says nothing of its states, or says something else."""
    spec = MambaSpec(
        block_size=256,
        shapes=MODELS["gdn"].shapes(2),
        dtypes=(HALF, HALF),
        mamba_type=Kind.GDN_ATTN,
        mamba_cache_mode="align",
    )
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=2), model_config=None
    )
    other = SimpleNamespace(get_mamba_state_shape_from_config=lambda given: ((1, 1), (1, 1, 1)))
    for of_model in (SimpleNamespace(), other):
        monkeypatch.setattr(loader_utils, "get_model_cls", lambda given, it=of_model: it)
        with pytest.raises(UnsupportedEngine, match="--tensor-parallel-size 1"):
            state_fields(config, spec, num_layers=NUM_LAYERS)


def test_memory_that_is_too_small_for_a_field_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(MODELS["mamba2"], 0, 1, monkeypatch)
    short = rank.pages[0][..., :-4]
    with pytest.raises(UnsupportedEngine, match="where recurrent ends at"):
        state_view(short, rank.fields[-1], num_heads=8)
