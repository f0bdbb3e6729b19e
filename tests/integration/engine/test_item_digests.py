"""The digest of what a model is given names it and nothing else."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.multimodal.inputs import MultiModalKwargsItem

from tests.integration.engine.naming_parts import blue, picture, red
from ucm.integration.vllm import items
from ucm.integration.vllm.items import VllmItems, content_digest

# Small, so that what differs a little is met often.
SHAPES: st.SearchStrategy[list[int]] = st.lists(st.integers(0, 2), max_size=3)
TORCH_TYPES = (torch.uint8, torch.int8, torch.bool, torch.bfloat16, torch.float16, torch.int32)
NUMPY_TYPES = ("u1", "i1", "<i2", ">i2", "<f4")
NAMES = ("pixel_values", "image_embeds", "image_grid_thw")


@st.composite
def tensors(draw: Callable[[Any], Any]) -> torch.Tensor:
    shape = draw(SHAPES)
    numbers = draw(st.lists(st.integers(0, 1), min_size=8, max_size=8))
    values = torch.tensor(numbers[: int(np.prod(shape, dtype=int))]).reshape(shape)
    return values.to(draw(st.sampled_from(TORCH_TYPES)))


@st.composite
def arrays(draw: Callable[[Any], Any]) -> np.ndarray[Any, Any]:
    dtype = np.dtype(draw(st.sampled_from(NUMPY_TYPES)))
    return np.asarray(draw(tensors()).float().numpy()).astype(dtype)


VALUES: st.SearchStrategy[Any] = st.recursive(
    tensors()
    | arrays()
    | st.none()
    | st.booleans()
    | st.integers(0, 2)
    | st.sampled_from([0.0, -0.0, 1.0, "", "0", "1", "None", b"", b"0"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=4,
)
FIELDS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=2)


def item(fields: dict[str, Any]) -> MultiModalKwargsItem:
    return picture(fields).data


def digest(fields: dict[str, Any], modality: str = "image") -> bytes:
    return content_digest(modality, item(fields))


def told(value: Any) -> Any:
    """All that makes a value what it is, for comparison."""
    if isinstance(value, torch.Tensor):
        raw = bytes(value.contiguous().reshape(-1).view(torch.uint8).tolist())
        return "tensor", str(value.dtype), tuple(value.shape), raw
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict):
        return "map", tuple(sorted((name, told(each)) for name, each in value.items()))
    if isinstance(value, list):
        return "list", tuple(told(each) for each in value)
    return type(value).__name__, repr(value)


def made_anew(value: Any) -> Any:
    """As it comes out of another process: elsewhere in memory, with gaps between its numbers, and
    its fields in another order."""
    if isinstance(value, torch.Tensor):
        gaps = torch.zeros((*value.shape, 2), dtype=value.dtype)
        gaps[..., 0] = value
        return gaps[..., 0]
    if isinstance(value, np.ndarray):
        return value.copy(order="F")
    if isinstance(value, dict):
        return {name: made_anew(value[name]) for name in reversed(value)}
    if isinstance(value, list):
        return tuple(made_anew(each) for each in value)
    return value


@given(FIELDS)
def test_the_same_values_have_one_digest_however_they_lie_in_memory(fields: dict[str, Any]) -> None:
    """vLLM 0.32 hands out the fields of an item in another order than 0.28."""
    assert digest(made_anew(fields)) == digest(fields)


@given(FIELDS, FIELDS)
def test_two_digests_are_equal_only_if_all_that_the_model_is_given_is(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert (digest(one) == digest(other)) == (told(one) == told(other))


@given(st.lists(st.integers(0, 255), min_size=24, max_size=24), st.data())
def test_any_change_of_an_item_is_another_item(numbers: list[int], data: st.DataObject) -> None:
    pixels, grid = torch.tensor(numbers, dtype=torch.uint8).reshape(2, 3, 4), torch.tensor([2, 3])
    whole = {"pixel_values": pixels, "image_grid_thw": grid}

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        copy.reshape(-1).view(torch.uint8)[data.draw(st.integers(0, tensor.nbytes - 1))] ^= 1
        return copy

    others: list[dict[str, Any]] = [
        {**whole, "pixel_values": changed(pixels)},
        {**whole, "image_grid_thw": changed(grid)},
        {**whole, "pixel_values": pixels.reshape(data.draw(st.sampled_from([(3, 2, 4), (24,)])))},
        {**whole, "pixel_values": pixels[None]},
        {**whole, "pixel_values": pixels.view(torch.int8)},
        {**whole, "pixel_values": pixels.numpy()},
        {**whole, "pixel_values": list(pixels)},
        {"pixel_value": pixels, "image_grid_thw": grid},
        {"pixel_values": grid, "image_grid_thw": pixels},
        {**whole, "image_sizes": None},
        {"pixel_values": pixels},
        {"image_embeds": pixels, "image_grid_thw": grid},
    ]
    found = [digest(each) for each in (whole, *others)]
    found += [digest(whole, modality) for modality in ("video", "audio")]
    assert len(set(found)) == len(found)


def test_values_that_look_alike_are_told_apart() -> None:
    texts = [None, "None", b"None", True, "True", 1, "1", b"1", 1.0, "1.0", 0.0, -0.0, "", b""]
    lists = [[], [[]], [[], []], [1, [2]], [[1], 2], [[1, 2]], [1, 2], [[1, 2], [3]], [[1], [2, 3]]]
    maps = [{}, {"a": 1}, ["a", 1], {"a": {"b": 1}}, {"a": {}, "b": 1}, [{"a": 1}, {}]]
    found = [digest({"sizes": value}) for value in (*texts, *lists, *maps)]
    assert len(set(found)) == len(found)


def test_the_mask_of_a_whole_prompt_is_no_part_of_its_picture() -> None:
    """vLLM 0.23 to 0.26 have it in the item, and not even that of the prompt that is asked."""
    mask = torch.tensor([[0, 0, 1, 1, 0]])
    fields = {"pixel_values": red()}
    assert digest({**fields, "mm_token_type_ids": mask}) == digest(fields)


def test_an_item_is_digested_once_while_vllm_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under another name and elsewhere, too. Nothing is kept of one that is gone."""
    digested: list[str] = []

    def counting(modality: str, data: Any) -> bytes:
        digested.append(modality)
        return content_digest(modality, data)

    monkeypatch.setattr(items, "content_digest", counting)
    names = VllmItems(16)
    first = picture(red())
    again = picture(None, name="cd" * 32, start=3)
    again.data = first.data

    assert names.of([first]).items[0].identifier == names.of([again]).items[0].identifier
    assert len(digested) == 1
    # The same content, which has come a second time.
    assert names.of([picture(red())]) == names.of([first])
    names.of([picture(blue(), name="ef" * 32)])
    assert len(digested) == 3

    del first, again
    gc.collect()
    assert names._digests == {}


@pytest.mark.parametrize(
    ("odd", "plain"),
    [
        (torch.ones(1, 2)[:, 0], torch.ones(1)),
        (torch.ones(0, 2)[:, 0], torch.ones(0)),
        (torch.ones(1).expand(3), torch.ones(3)),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
        (torch.tensor([1 + 2j]).conj().imag, torch.tensor([-2.0])),
        (torch.ones(2, requires_grad=True), torch.ones(2)),
    ],
    ids=["one of a column", "none of a column", "one thrice", "conjugate", "negative", "learning"],
)
def test_a_tensor_that_torch_holds_in_an_odd_way_is_what_it_says(
    odd: torch.Tensor, plain: torch.Tensor
) -> None:
    assert digest({"image_embeds": odd}) == digest({"image_embeds": plain})
