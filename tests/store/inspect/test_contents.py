"""What is said of a namespace, and of which strand a page is told to be."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from tests.cli.parts import manifest

pytest.importorskip("vllm")

from tests.cli.hybrids import (
    Hybrid,
    with_an_indexer,
    with_chunks_as_large,
    with_states,
    with_windows,
    with_windows_alone,
)
from ucm.store.blocks.blockfile import BlockId
from ucm.store.blocks.keys import Key
from ucm.store.blocks.namespace import Manifest
from ucm.store.inspect.model_label import model_label, strand_labels
from ucm.store.inspect.strand_pages import StrandPages

HYBRIDS = {
    with_windows: ["all", "window 256"],
    with_states: ["all", "state"],
    with_chunks_as_large: ["all", "chunk 8192"],
    with_windows_alone: ["window 256"],
    # One more per layer, beside the latent KV.
    with_an_indexer: ["all", "all/1x8448+0/1/64"],
}


def by_weights(made: Manifest) -> Manifest:
    return msgspec.structs.replace(
        made, weights="sha256:" + "ab" * 32, model_shape={"model_type": "tiny"}
    )


def test_a_model_is_named_with_all_its_layers_and_with_its_strands() -> None:
    """The manifest's own number is that of the first strand, and a page of states has one layer."""
    plain = manifest("a", num_layers=4)
    assert (model_label(plain), strand_labels(plain)) == ("a", [])
    assert model_label(by_weights(plain)) == "tiny, 4 layers, weights abababab"
    for make, strands in HYBRIDS.items():
        made = make().manifest
        assert strand_labels(made) == strands
        assert model_label(made).endswith(f" ({', '.join(strands)})")
        num_layers = 3 if make is with_an_indexer else 4
        shown = model_label(by_weights(made))
        assert shown == f"tiny, {num_layers} layers, weights abababab ({', '.join(strands)})"


@pytest.mark.parametrize("make", HYBRIDS)
def test_a_page_is_told_to_be_of_the_strand_whose_pages_are_so_large(
    make: Callable[[], Hybrid],
) -> None:
    made = make()
    pages = StrandPages(made.manifest)
    assert pages.page_bytes == [strand.geometry.page_bytes for strand in made.facts.strands]
    for strand, label in zip(made.facts.strands, strand_labels(made.manifest), strict=True):
        page_bytes = strand.geometry.page_bytes
        file_bytes = BlockId(Key(bytes(32)), bytes(32), page_bytes).file_bytes
        told = "all or chunk 8192" if make is with_chunks_as_large else label
        assert pages.of_page(page_bytes) == pages.of_file(file_bytes) == told
        assert pages.of_page(page_bytes + 1) == pages.of_file(file_bytes - 1) == ""


def test_of_a_plain_model_and_of_an_odd_manifest_nothing_is_told() -> None:
    odd: list[dict[str, object]] = [
        {"num_layers": "many", "layers": [[1]], "layout": 7},
        {**dict.fromkeys(("num_layers", "num_kv_heads", "k_size", "item_bytes"), 0), "v_size": 1},
    ]
    for made in (None, manifest("a"), manifest("a", format_version=2, strands=odd)):
        pages = StrandPages(made)
        assert not any(pages.page_bytes)
        assert (pages.of_page(0), pages.of_file(4096)) == ("", "")
    assert model_label(manifest("a", strands=odd)) == "a (?, ?)"
    by_digest = by_weights(manifest("a", num_layers=4, strands=odd))
    assert model_label(by_digest).startswith("tiny, 4 layers,")
