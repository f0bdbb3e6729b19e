"""What is said of a namespace."""

from __future__ import annotations

import msgspec

from tests.store.blocks.test_namespace import MANIFEST, STRANDED
from ucm.store.inspect.contents import model_label


def test_a_model_has_the_layers_of_all_its_strands() -> None:
    """The manifest's own number is that of the base strand."""
    assert model_label(MANIFEST) == "a model, 28 layers, weights abababab"
    assert model_label(STRANDED) == "a model, 28 layers, weights abababab"
    odd = msgspec.structs.replace(STRANDED, strands=[{"num_layers": "many"}])
    assert model_label(odd) == "a model, 4 layers, weights abababab"
