"""The page's arithmetic against a plain numpy array with the same named dimensions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucm.store.blocks.page_layout import PageGeometry, RankShare, Run, rank_share

sizes = st.integers(1, 5)


@st.composite
def geometries(draw: st.DrawFn) -> PageGeometry:
    unit_tokens = draw(sizes)
    return PageGeometry(
        num_layers=draw(sizes),
        num_kv_heads=draw(st.sampled_from([1, 2, 3, 4, 6, 8])),
        block_tokens=unit_tokens * draw(sizes),
        k_size=draw(sizes),
        v_size=draw(st.integers(0, 4)),
        item_bytes=draw(st.sampled_from([1, 2, 4])),
        unit_tokens=unit_tokens,
    )


def model_of(geometry: PageGeometry) -> np.ndarray:
    """A page whose bytes are their own offsets, [layer, head, unit, byte]."""
    layers, heads, units, content = geometry.shape
    width = content * geometry.item_bytes
    return np.arange(geometry.page_bytes).reshape(layers, heads, units, width)


def bytes_of(page: np.ndarray, run: Run) -> np.ndarray:
    return page.reshape(-1)[run.offset : run.end]


@given(geometries())
def test_every_unit_lies_where_the_canonical_order_puts_it(geometry: PageGeometry) -> None:
    page = model_of(geometry)
    for layer, head, unit in np.ndindex(*geometry.shape[:3]):
        assert page[layer, head, unit, 0] == geometry.offset(layer, head, unit)


@given(geometries())
def test_the_strides_are_those_of_the_array(geometry: PageGeometry) -> None:
    _, _, units, content = geometry.shape

    assert content * geometry.item_bytes == geometry.unit_bytes
    assert units * geometry.unit_bytes == geometry.head_bytes
    assert geometry.num_kv_heads * geometry.head_bytes == geometry.layer_bytes
    assert geometry.num_layers * geometry.layer_bytes == geometry.page_bytes


@given(geometries())
def test_a_slot_is_the_page_rounded_up_to_4096(geometry: PageGeometry) -> None:
    assert geometry.slot_bytes % 4096 == 0
    assert 0 <= geometry.slot_bytes - geometry.page_bytes < 4096


@given(geometries(), st.data())
def test_a_run_is_neighbouring_heads_of_one_layer(geometry: PageGeometry, data: st.DataObject):
    layer = data.draw(st.integers(0, geometry.num_layers - 1))
    first = data.draw(st.integers(0, geometry.num_kv_heads - 1))
    heads = range(first, data.draw(st.integers(first + 1, geometry.num_kv_heads)))
    page = model_of(geometry)

    expected = page[layer, heads.start : heads.stop].reshape(-1)

    assert expected.tolist() == bytes_of(page, geometry.run(layer, heads)).tolist()


def shares_of(geometry: PageGeometry, tp_size: int, layers: range) -> list[RankShare]:
    return [
        rank_share(geometry, tp_rank=rank, tp_size=tp_size, layers=layers)
        for rank in range(tp_size)
    ]


@given(geometries(), st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16]), st.data())
def test_what_the_ranks_dump_is_every_byte_of_the_page_once(
    geometry: PageGeometry, tp_size: int, data: st.DataObject
):
    """For every tensor parallel split, and every cut of the layers into pipeline stages, or into
    groups of every nth."""
    heads = geometry.num_kv_heads
    if heads % tp_size and tp_size % heads:
        with pytest.raises(ValueError, match="one must divide the other"):
            shares_of(geometry, tp_size, range(geometry.num_layers))
        return
    cut = data.draw(st.integers(1, geometry.num_layers))
    stages = [range(cut), range(cut, geometry.num_layers)]
    groups = [range(first, geometry.num_layers, cut) for first in range(cut)]
    page = model_of(geometry)
    dumped: list[int] = []
    for layers in filter(len, data.draw(st.sampled_from([stages, groups]))):
        for share in shares_of(geometry, tp_size, layers):
            if share.dumps:
                for layer in share.layers:
                    dumped += bytes_of(page, geometry.run(layer, share.heads)).tolist()

    assert list(range(geometry.page_bytes)) == sorted(dumped)


@given(geometries(), st.data())
def test_the_layers_of_a_share_lie_at_one_distance(geometry: PageGeometry, data: st.DataObject):
    step = data.draw(st.integers(1, geometry.num_layers))
    share = rank_share(geometry, tp_rank=0, tp_size=1, layers=range(0, geometry.num_layers, step))
    starts = [geometry.offset(layer, 0) for layer in share.layers]

    distance = share.layer_stride_bytes(geometry)
    assert starts == [distance * i for i in range(len(share.layers))]


@given(geometries(), st.sampled_from([1, 2, 4]))
def test_replicated_heads_are_dumped_by_the_first_that_holds_them(
    geometry: PageGeometry, replicas: int
):
    tp_size = geometry.num_kv_heads * replicas
    shares = shares_of(geometry, tp_size, range(geometry.num_layers))

    for rank, share in enumerate(shares):
        head = rank // replicas
        assert range(head, head + 1) == share.heads
        assert (rank % replicas == 0) == share.dumps


@given(st.integers(1, 8))
def test_of_a_latent_cache_rank_zero_dumps_all_and_every_rank_loads_all(tp_size: int) -> None:
    geometry = PageGeometry(
        num_layers=3, num_kv_heads=1, block_tokens=4, k_size=9, v_size=0, item_bytes=2
    )
    shares = shares_of(geometry, tp_size, range(3))

    assert [RankShare(range(3), range(1), dumps=rank == 0) for rank in range(tp_size)] == shares


def test_an_opaque_layout_has_engine_blocks_as_units_and_ranks_as_heads() -> None:
    """Two ranks, engine blocks of 32 tokens and 1000 bytes, blocks of 128 tokens, 3 layers."""
    geometry = PageGeometry(
        num_layers=3,
        num_kv_heads=2,
        block_tokens=128,
        k_size=1000,
        v_size=0,
        item_bytes=1,
        unit_tokens=32,
    )

    assert (3, 2, 4, 1000) == geometry.shape
    assert 24000 == geometry.page_bytes
    assert 24576 == geometry.slot_bytes
    assert range(1, 2) == rank_share(geometry, tp_rank=1, tp_size=2, layers=range(3)).heads
    assert Run(2 * 8000 + 4000, 4000) == geometry.run(2, range(1, 2))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0, must be at least 1"),
        ({"v_size": -1}, "v_size is -1, must not be negative"),
        ({"unit_tokens": 3}, r"unit_tokens is 3, must divide block_tokens \(16\)"),
    ],
)
def test_an_impossible_geometry_is_refused(changed: dict[str, int], message: str) -> None:
    sane = {
        "num_layers": 1,
        "num_kv_heads": 1,
        "block_tokens": 16,
        "k_size": 1,
        "v_size": 1,
        "item_bytes": 1,
    }
    with pytest.raises(ValueError, match=message):
        PageGeometry(**{**sane, **changed})


@pytest.mark.parametrize(
    ("tp_rank", "layers", "message"),
    [
        (2, range(3), "rank 2 of 2 does not exist"),
        (0, range(1, 4), r"layers range\(1, 4\) are not some of 3, first to last"),
        (0, range(1, 1), "are not some of 3"),
        (0, range(-1, 2), "are not some of 3"),
        (0, range(1, 4, 2), "are not some of 3"),
        (0, range(2, -1, -1), "are not some of 3"),
        (0, range(2, 1, -1), "are not some of 3"),
    ],
)
def test_a_share_that_does_not_exist_is_refused(tp_rank: int, layers: range, message: str) -> None:
    geometry = PageGeometry(
        num_layers=3, num_kv_heads=2, block_tokens=4, k_size=1, v_size=1, item_bytes=1
    )
    with pytest.raises(ValueError, match=message):
        rank_share(geometry, tp_rank=tp_rank, tp_size=2, layers=layers)
