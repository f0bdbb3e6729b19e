"""The fields of a layer's state: what of it belongs to which head, so that a page of states is the
same for every number of ranks.

vLLM describes a state by the shapes of a rank's tensors, which lie side by side in a block. That of
a convolution holds the inputs of the last few tokens, in columns of several kinds; the recurrent
one is cut by heads.

    kind        columns of the convolution           recurrent [head, row, column]
    MAMBA2      x by heads, then B and C by groups   [heads, head size, state size]
    GDN_ATTN    q and k by k-heads, v by v-heads     [v-heads, v size, k size]
    MAMBA1      x by channels                        [channels, state size]
    SHORT_CONV  x by channels                        none

With more ranks than groups (Mamba2 has one then) every rank has that group.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ucm.errors import UnsupportedEngine
from ucm.integration.copies.state_field import StateField
from ucm.integration.vllm.identity import dtype_name
from ucm.store.blocks.page_layout import PageGeometry

# Channels that have no heads are cut into so many parts at most: into as many as there are ranks.
_MOST_PARTS: Final = 64
_KINDS: Final = ("MAMBA1", "MAMBA2", "GDN_ATTN", "SHORT_CONV")

_Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _ColumnsByHead:
    """`count` heads of `size` columns each, or of as many channels."""

    name: str
    count: int
    size: int


def state_kind(spec: Any) -> str:
    return str(getattr(spec.mamba_type, "name", spec.mamba_type))


def state_fields(vllm_config: Any, spec: Any, *, num_layers: int) -> tuple[StateField, ...]:
    """Of layers with this spec. Raises UnsupportedEngine if they can't be told apart."""
    local = _shapes(spec.shapes)
    expected = 1 if state_kind(spec) == "SHORT_CONV" else 2
    is_known = state_kind(spec) in _KINDS and not _is_ordered_by_a_kernel(spec)
    if not is_known or len(local) != expected or spec.tp_replicated:
        shown = ", ".join("x".join(map(str, shape)) for shape in local)
        raise UnsupportedEngine(
            f"this model has layers whose state UCM doesn't know ({state_kind(spec)}, {shown}): "
            "run it without UCM"
        )
    fields: list[StateField] = []
    begin = 0
    for field in _fields(spec, local, _of_all_ranks(vllm_config, local), num_layers):
        fields.append(replace(field, page_offset_bytes=begin))
        begin += field.geometry.slot_bytes
    return tuple(fields)


def _fields(spec: Any, local: _Shapes, whole: _Shapes, num_layers: int) -> Iterator[StateField]:
    """Those of the convolution, then the recurrent one; where they lie in a page is left open."""
    num_rows, num_columns, dims_first = _convolution(local[0])
    kind = state_kind(spec)
    heads = _columns(kind, _convolution(whole[0])[1], whole[1:])
    of_rank = _columns(kind, num_columns, local[1:], part_size=heads[0].size)
    first = 0
    for of_all, here in zip(heads, of_rank, strict=True):
        yield _field(
            f"conv.{of_all.name}",
            (num_layers, of_all.count, num_rows, of_all.size),
            block_offset_bytes=(first * num_rows if dims_first else first) * _bytes(spec, 0),
            strides=(
                (here.size * num_rows, 1, num_rows) if dims_first else (here.size, num_columns, 1)
            ),
            dtype=spec.dtypes[0],
        )
        first += here.count * here.size
    if len(local) == 1:
        return
    # Mamba1's channels are rows, of as many heads as there are parts.
    by_head = local[1] if len(local[1]) == 3 else (1, heads[0].size, local[1][-1])
    count = whole[1][0] if len(whole[1]) == 3 else heads[0].count
    _, rows, columns = by_head
    yield _field(
        "recurrent",
        (num_layers, count, rows, columns),
        block_offset_bytes=math.prod(local[0]) * _bytes(spec, 0),
        strides=(rows * columns, *((1, rows) if _is_turned(kind) else (columns, 1))),
        dtype=spec.dtypes[1],
    )


def _is_ordered_by_a_kernel(spec: Any) -> bool:
    """vLLM's kernel of gated delta nets for XPU reorders what it is given in its own way."""
    from vllm.platforms import current_platform

    return state_kind(spec) == "GDN_ATTN" and current_platform.device_type == "xpu"


def _is_turned(kind: str) -> bool:
    """vLLM's CPU kernels of gated delta nets keep [head, k, v] in what is described as
    [head, v, k]."""
    from vllm.platforms import current_platform

    return kind == "GDN_ATTN" and current_platform.device_type == "cpu"


def _field(
    name: str,
    shape: tuple[int, int, int, int],
    *,
    block_offset_bytes: int,
    strides: tuple[int, int, int],
    dtype: Any,
) -> StateField:
    num_layers, num_heads, num_rows, num_columns = shape
    geometry = PageGeometry(
        num_layers=num_layers,
        num_kv_heads=num_heads,
        block_tokens=num_rows,
        k_size=num_columns,
        v_size=0,
        item_bytes=int(dtype.itemsize),
    )
    return StateField(
        name=name,
        geometry=geometry,
        page_offset_bytes=0,
        block_offset_bytes=block_offset_bytes,
        strides=strides,
        dtype=dtype_name(dtype),
    )


def _columns(
    kind: str, num_columns: int, recurrent: _Shapes, *, part_size: int = 0
) -> list[_ColumnsByHead]:
    """What the columns of a convolution are, in their order. `part_size` is that of channels."""
    if kind == "MAMBA2":
        (num_heads, head_size, state_size) = recurrent[0]
        rest = num_columns - num_heads * head_size
        groups = [_ColumnsByHead(name, rest // (2 * state_size), state_size) for name in "BC"]
        columns = [_ColumnsByHead("x", num_heads, head_size), *groups]
    elif kind == "GDN_ATTN":
        (num_heads, v_size, k_size) = recurrent[0]
        rest = num_columns - num_heads * v_size
        columns = [_ColumnsByHead(name, rest // (2 * k_size), k_size) for name in "qk"]
        columns.append(_ColumnsByHead("v", num_heads, v_size))
    else:
        part_size = part_size or num_columns // math.gcd(num_columns, _MOST_PARTS)
        columns = [_ColumnsByHead("x", num_columns // part_size, part_size)]
    if sum(each.count * each.size for each in columns) != num_columns:
        raise UnsupportedEngine(
            f"a state of {kind} has {num_columns} columns in its convolution and "
            f"{[list(shape) for shape in recurrent]} beside it: can't tell which are whose, run it "
            "without UCM"
        )
    return columns


def _convolution(shape: Sequence[int]) -> tuple[int, int, bool]:
    """Rows, which are tokens; columns; and whether columns come first."""
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

    if is_conv_state_dim_first():
        return shape[1], shape[0], True
    return shape[0], shape[1], False


def _of_all_ranks(vllm_config: Any, local: _Shapes) -> _Shapes:
    """The shapes that one rank alone would have."""
    if int(vllm_config.parallel_config.tensor_parallel_size) == 1:
        return local
    from vllm.model_executor.model_loader.utils import get_model_cls

    of_model = getattr(
        get_model_cls(vllm_config.model_config), "get_mamba_state_shape_from_config", None
    )
    if of_model is None or _shapes(of_model(vllm_config)) != local:
        raise UnsupportedEngine(
            "can't tell how the states of this model's layers are cut over ranks: run it with "
            "--tensor-parallel-size 1"
        )
    alone, parallel = copy.copy(vllm_config), copy.copy(vllm_config.parallel_config)
    parallel.tensor_parallel_size = 1
    alone.parallel_config = parallel
    return _shapes(of_model(alone))


def _shapes(shapes: Any) -> _Shapes:
    return tuple(tuple(map(int, shape)) for shape in shapes)


def _bytes(spec: Any, number: int) -> int:
    return int(spec.dtypes[number].itemsize)
