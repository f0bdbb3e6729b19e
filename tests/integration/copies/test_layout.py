"""KV tensors as named views: the right elements, by strides alone."""

from __future__ import annotations

import platform
import re

import pytest
import torch

from tests.integration.copies.kv_layouts import ALL_LAYOUTS, Rank, geometry_for, make_rank
from ucm.errors import UnsupportedEngine
from ucm.integration.copies.layout import LayerView, layer_view
from ucm.integration.copies.layout_kind import LayoutKind
from ucm.integration.copies.placement import placed_parts
from ucm.integration.copies.target import CopyTarget
from ucm.store.blocks.page_layout import PageGeometry, rank_share

HEADS = PageGeometry(
    num_layers=3, num_kv_heads=4, block_tokens=32, k_size=16, v_size=16, item_bytes=2
)
LATENT = PageGeometry(
    num_layers=3, num_kv_heads=1, block_tokens=32, k_size=72, v_size=0, item_bytes=2
)


def contents(view: LayerView) -> torch.Tensor:
    """[block, head, unit, content]"""
    if any(place.piece_step for place in view.places):
        latent, halves = view.parts
        rope = halves.permute(0, 2, 3, 1).flatten(-2).unsqueeze(1)
        return torch.cat([latent, rope], dim=-1)
    return torch.cat(view.parts, dim=-1)


def rank_of(layout: str) -> Rank:
    return make_rank(layout, geometry_for(layout, heads=HEADS, latent=LATENT), seed=1)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_the_view_of_every_layout_has_the_named_elements(layout: str) -> None:
    rank = rank_of(layout)
    expected = rank.cache.read()

    assert torch.equal(expected, torch.stack([contents(view) for view in rank.views()]))


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_a_view_is_the_engine_s_own_memory(layout: str) -> None:
    rank = rank_of(layout)
    for view in rank.views():
        for part in view.parts:
            part.fill_(7)

    assert bool((rank.cache.read() == 7).all())


@pytest.mark.parametrize(
    ("layout", "parts", "width"),
    [
        ("LBHNC", 1, 8),
        ("LBNHC", 1, 8),
        ("BLHNC", 1, 8),
        ("latent_with_head", 1, 8),
        ("split_tensor", 6, 8),
        ("split_tuple", 6, 8),
    ],
)
def test_layers_at_one_distance_become_one_tensor_of_wide_items(
    layout: str, parts: int, width: int
) -> None:
    """Six parts: K and V of three layers, each layer in a storage of its own."""
    rank = rank_of(layout)
    placed = placed_parts(rank.target())

    assert parts == len(placed)
    assert {width} == {part.tensor.element_size() for part in placed}


def test_a_transposed_part_keeps_its_items() -> None:
    rank = rank_of("cpu_vec")
    keys, values = placed_parts(rank.target())

    assert torch.int16 == keys.tensor.dtype
    assert torch.int64 == values.tensor.dtype
    assert range(3) == keys.layers == values.layers


def test_layers_at_uneven_distances_stay_apart() -> None:
    """The third layer lies farther from the second than the second from the first."""
    stored = torch.arange(5 * 2 * 4 * 32 * 32, dtype=torch.int32).to(torch.int16)
    stored = stored.view(5, 2, 4, 32, 32)
    share = rank_share(HEADS, tp_rank=0, tp_size=1, layers=range(3))
    views = [
        layer_view(
            stored[i], kind=LayoutKind.AS_SHAPED, geometry=HEADS, num_heads=4, block_tokens=32
        )
        for i in (0, 1, 4)
    ]
    placed = placed_parts(CopyTarget(views, HEADS, share))

    assert [range(2), range(2, 3)] == [part.layers for part in placed]
    assert torch.equal(stored[4], placed[1].tensor[0].view(torch.int16))


def test_nan_bits_are_seen_as_integers() -> None:
    bits = torch.tensor([0x7FC1, -1, 0x7F81, 0x0001], dtype=torch.int16).repeat(8 * 4 * 32 * 8)
    kv = bits.view(8, 4, 32, 32).view(torch.bfloat16)
    view = layer_view(kv, kind=LayoutKind.AS_SHAPED, geometry=HEADS, num_heads=4, block_tokens=32)

    assert torch.equal(bits.view(8, 4, 32, 32), view.parts[0])


def test_opaque_blocks_are_their_bytes_whatever_their_order() -> None:
    """Blocks of [N, H, C], in memory as [C, H, N], with a gap between blocks."""
    raw = torch.randint(0, 256, (6, 2, 10, 4, 32), dtype=torch.uint8)
    kv = raw[:, 0].view(torch.int16).permute(0, 3, 2, 1)
    geometry = PageGeometry(
        num_layers=1,
        num_kv_heads=1,
        block_tokens=128,
        k_size=10 * 4 * 32,
        v_size=0,
        item_bytes=1,
        unit_tokens=64,
    )
    view = layer_view(kv, kind=LayoutKind.OPAQUE, geometry=geometry, num_heads=1, block_tokens=64)

    assert torch.equal(raw[:, 0].reshape(6, 1, 1, -1), view.parts[0])
    assert raw.data_ptr() == view.parts[0].data_ptr()


def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def test_keys_and_values_of_unlike_sizes_are_not_guessed_where_heads_are_as_many_as_tokens() -> (
    None
):
    """vLLM until 0.25 has the tokens first and later the heads; where they are equal sizes the
    shape is that of both."""
    alike, unlike = (
        PageGeometry(
            num_layers=1, num_kv_heads=16, block_tokens=16, k_size=k, v_size=v, item_bytes=2
        )
        for k, v in ((16, 16), (24, 8))
    )
    kv = zeros(8, 16, 16, 32)
    layer_view(kv, kind=LayoutKind.AS_SHAPED, geometry=alike, num_heads=16, block_tokens=16)
    with pytest.raises(UnsupportedEngine, match=TWO_THINGS):
        layer_view(kv, kind=LayoutKind.AS_SHAPED, geometry=unlike, num_heads=16, block_tokens=16)


def test_raw_blocks_are_those_of_one_tensor() -> None:
    """A second one beside it would be left out of the page."""
    geometry = PageGeometry(
        num_layers=1,
        num_kv_heads=1,
        block_tokens=32,
        k_size=2 * 4 * 32 * 32,
        v_size=0,
        item_bytes=1,
        unit_tokens=32,
    )
    kv = zeros(8, 4, 32, 32)
    layer_view(kv, kind=LayoutKind.OPAQUE, geometry=geometry, num_heads=1, block_tokens=32)
    with pytest.raises(UnsupportedEngine, match=KNOWN):
        layer_view(
            (kv, zeros(8, 4, 32, 1)),
            kind=LayoutKind.OPAQUE,
            geometry=geometry,
            num_heads=1,
            block_tokens=32,
        )


KNOWN, TWO_THINGS = "which is no layout that UCM knows", "which may mean two things"
HEADS_TEXT = "of 4 heads, 32 units and 16 + 16 elements of 2 bytes"
LATENT_TEXT = "of 1 heads, 32 units and 72 + 0 elements of 2 bytes"


@pytest.mark.parametrize(
    ("kv", "told"),
    [
        (zeros(8, 4, 32, 32, dtype=torch.float32), f"[8, 4, 32, 32] of float32, {KNOWN}"),
        (zeros(8, 2, 32, 32), f"[8, 2, 32, 32] of float16, {KNOWN}"),
        (zeros(8, 4, 16, 32), f"[8, 4, 16, 32] of float16, {KNOWN}"),
        (zeros(8, 4, 32, 48), f"[8, 4, 32, 48] of float16, {KNOWN}"),
        (zeros(8, 4, 32), f"[8, 4, 32] of float16, {KNOWN}"),
        (zeros(8, 32, 4, 32), f"[8, 32, 4, 32] of float16, {KNOWN}"),
        (zeros(2, 8, 4, 32, 16), f"[2, 8, 4, 32, 16] of float16, {KNOWN}"),
        (zeros(2, 2, 32, 4, 16), f"[2, 2, 32, 4, 16] of float16, {TWO_THINGS}"),
        ((zeros(8, 32, 4, 16),) * 3, f"[8, 32, 4, 16]) of float16, {KNOWN}"),
        ((zeros(8, 4, 32, 16),) * 2, f"([8, 4, 32, 16], [8, 4, 32, 16]) of float16, {KNOWN}"),
        ((zeros(8, 32, 4, 16), zeros(9, 32, 4, 16)), f"[9, 32, 4, 16]) of float16, {KNOWN}"),
        ((zeros(8, 32, 4, 20), zeros(8, 32, 4, 12)), f"[8, 32, 4, 12]) of float16, {KNOWN}"),
        (
            (zeros(8, 32, 4, 16), zeros(8, 32, 4, 16, dtype=torch.int8)),
            f"[8, 32, 4, 16]) of float16 and int8, {KNOWN}",
        ),
    ],
)
def test_a_layout_that_no_shape_tells_is_refused_with_its_shape_and_layer(
    kv: torch.Tensor | tuple[torch.Tensor, ...], told: str
) -> None:
    with pytest.raises(UnsupportedEngine) as refusal:
        layer_view(
            kv,
            kind=LayoutKind.AS_SHAPED,
            geometry=HEADS,
            num_heads=4,
            block_tokens=32,
            layer="model.layers.7.attn",
        )

    text = str(refusal.value)
    assert text.startswith("the KV cache of model.layers.7.attn is ")
    assert told in text and HEADS_TEXT in text and "\n" not in text


@pytest.mark.parametrize("kind", [LayoutKind.AS_SHAPED, LayoutKind.ROPE_HALVES])
@pytest.mark.parametrize(
    "kv",
    [
        zeros(8, 2, 32, 72),
        zeros(8, 32, 64),
        (zeros(8, 32, 64), zeros(8, 32, 16)),
        (zeros(8, 32, 64), zeros(8, 32, 4), zeros(8, 32, 4)),
        (zeros(8, 32, 1, 64), zeros(8, 32, 2, 8)),
        (zeros(8, 32, 1, 8), zeros(8, 32, 1, 64)),
    ],
)
def test_a_latent_that_no_shape_tells_is_refused(
    kv: torch.Tensor | tuple[torch.Tensor, ...], kind: LayoutKind
) -> None:
    with pytest.raises(UnsupportedEngine, match=re.escape(f"{KNOWN} {LATENT_TEXT}")):
        layer_view(kv, kind=kind, geometry=LATENT, num_heads=1, block_tokens=32)


@pytest.mark.parametrize("kv", [zeros(8, 32, 72), (zeros(8, 32, 63), zeros(8, 32, 9))])
def test_a_latent_whose_rope_part_is_not_to_be_found_has_no_halves(
    kv: torch.Tensor | tuple[torch.Tensor, ...],
) -> None:
    layer_view(kv, kind=LayoutKind.AS_SHAPED, geometry=LATENT, num_heads=1, block_tokens=32)
    with pytest.raises(UnsupportedEngine, match=KNOWN):
        layer_view(kv, kind=LayoutKind.ROPE_HALVES, geometry=LATENT, num_heads=1, block_tokens=32)


@pytest.mark.parametrize(
    ("kind", "geometry", "message"),
    [
        (LayoutKind.CPU_VEC, HEADS, "16 + 16 elements of 2 bytes (cpu_vec)"),
        (
            LayoutKind.OPAQUE,
            PageGeometry(
                num_layers=1,
                num_kv_heads=1,
                block_tokens=32,
                k_size=1 << 13,
                v_size=0,
                item_bytes=1,
                unit_tokens=32,
            ),
            "not runs of bytes",
        ),
    ],
)
def test_blocks_with_gaps_are_refused_where_a_kernel_s_own_order_has_none(
    kind: LayoutKind, geometry: PageGeometry, message: str
) -> None:
    kv = zeros(8, 4, 64, 32)[:, :, ::2]
    with pytest.raises(UnsupportedEngine, match=re.escape(message)):
        layer_view(
            kv,
            kind=kind,
            geometry=geometry,
            num_heads=geometry.num_kv_heads,
            block_tokens=32,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_tokens", [16, 32, 64, 128])
def test_the_view_of_a_cpu_cache_is_what_vllm_s_kernel_wrote(
    dtype: torch.dtype, block_tokens: int
) -> None:
    """Tokens are written by the real kernel, block by block, and read through the view."""
    ops = pytest.importorskip("vllm._custom_ops")
    if platform.machine() != "x86_64" or not hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"):
        pytest.skip("needs vLLM's CPU build for x86-64")
    heads, size, num_blocks = 2, 64, 3
    geometry = PageGeometry(
        num_layers=1,
        num_kv_heads=heads,
        block_tokens=block_tokens,
        k_size=size,
        v_size=size,
        item_bytes=dtype.itemsize,
    )
    kv = torch.zeros(num_blocks, heads, block_tokens, 2 * size, dtype=dtype)
    num_tokens = num_blocks * block_tokens
    keys = torch.randn(num_tokens, heads, size).to(dtype)
    values = torch.randn(num_tokens, heads, size).to(dtype)
    rows = kv.view(num_blocks, heads, 2 * block_tokens, size)
    ops.cpu_attn_reshape_and_cache(
        keys,
        values,
        *rows.chunk(2, dim=2),
        torch.arange(num_tokens),
        "vec" if block_tokens % 32 == 0 else "vec16",
    )

    view = layer_view(
        kv,
        kind=LayoutKind.CPU_VEC,
        geometry=geometry,
        num_heads=heads,
        block_tokens=block_tokens,
    )

    for written, part in zip((keys, values), view.parts, strict=True):
        by_token = part.view(dtype).transpose(1, 2).reshape(num_tokens, heads, size)
        assert torch.equal(written, by_token)
