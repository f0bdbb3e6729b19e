"""Tensors in host memory, with every kind of strides. Devices are in tests/gpu."""

from __future__ import annotations

import ctypes

import pytest

torch = pytest.importorskip("torch")

from ucm.store.api.buffers import HostRow  # noqa: E402 (torch may be missing)
from ucm.store.api.tensors import TensorRow, tensor_rows  # noqa: E402

ODD = torch.arange(3, dtype=torch.uint8)
PLAIN = torch.arange(6, dtype=torch.float32).view(2, 3)
TRANSPOSED = torch.arange(20, dtype=torch.int16).view(4, 5).t()
HALF = torch.ones(2, 2, dtype=torch.bfloat16)
SIZES = (3, 24, 40, 8)


def roundtrip(row: list[torch.Tensor], into: list[torch.Tensor]) -> None:
    memory = ctypes.create_string_buffer(sum(SIZES))
    tensor_rows([row], SIZES)[0].dump_to(ctypes.addressof(memory))
    tensor_rows([into], SIZES)[0].load_from(ctypes.addressof(memory))


@pytest.mark.parametrize("of_rows", [True, False])
def test_tensors_of_any_type_and_strides_come_back_bit_for_bit(of_rows: bool) -> None:
    """A tensor behind one of an odd size lies at an odd offset of the page."""
    row = [ODD, PLAIN, TRANSPOSED if of_rows else TRANSPOSED.contiguous(), HALF]
    into = [torch.empty_like(tensor) for tensor in row]

    roundtrip(row, into)

    assert all(torch.equal(a, b) for a, b in zip(row, into, strict=True))


def test_the_order_in_the_page_does_not_depend_on_strides() -> None:
    into = [torch.empty_like(tensor) for tensor in (ODD, PLAIN, TRANSPOSED.contiguous(), HALF)]

    roundtrip([ODD, PLAIN, TRANSPOSED, HALF], into)

    assert torch.equal(into[2], TRANSPOSED)


def test_tensors_that_need_gradients_can_be_dumped_and_loaded_into() -> None:
    weight = torch.nn.Parameter(TRANSPOSED.to(torch.float64)[:1])
    memory = ctypes.create_string_buffer(32)
    (row,) = tensor_rows([[weight]], (32,))

    row.dump_to(ctypes.addressof(memory))
    row.load_from(ctypes.addressof(memory))

    assert weight.tolist() == [[0.0, 5.0, 10.0, 15.0]]


def test_plain_tensors_are_copied_without_torch() -> None:
    plain, strided = tensor_rows([[PLAIN], [PLAIN.t()]], (24,))

    assert isinstance(plain, HostRow)
    assert isinstance(strided, TensorRow)


def test_a_tensor_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tensors of \[24\] bytes, a shard has \[20\]"):
        tensor_rows([[PLAIN]], (20,))
