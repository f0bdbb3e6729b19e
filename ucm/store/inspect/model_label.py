"""What people read of a namespace: its model, and which strands that has."""

from __future__ import annotations

from typing import Final

from ucm.store.blocks.namespace import Manifest

_SHOWN_DIGITS: Final = 8


def model_label(manifest: Manifest) -> str:
    """A namespace's model in a few words: its `model_id`, or its kind and shape and the beginning
    of its weights' digest; and its strands, if it has several or windows."""
    kind, _, digest = manifest.weights.partition(":")
    label = digest or manifest.weights
    if kind == "sha256":
        name = manifest.model_shape.get("model_type", "a model")
        label = f"{name}, {_num_layers(manifest)} layers, weights {digest[:_SHOWN_DIGITS]}"
    strands = strand_labels(manifest)
    return f"{label} ({', '.join(strands)})" if strands else label


def strand_labels(manifest: Manifest) -> list[str]:
    """Of each strand its reach, and of one that shares that with another its name, if it has one;
    none of a model that is full attention of one kind."""
    strands = manifest.strands or []
    reaches = [str(strand.get("reach") or "?") for strand in strands]
    names = [str(strand.get("name") or "") for strand in strands]
    return [
        name if name and reaches.count(reach) > 1 else reach
        for name, reach in zip(names, reaches, strict=True)
    ]


def _num_layers(manifest: Manifest) -> int:
    """A layer may be in several strands, as MLA and the indexer beside it are."""
    found: set[int] = set()
    for strand in manifest.strands or ():
        layers = strand.get("layers")
        if isinstance(layers, list):
            found.update(layer for layer in layers if isinstance(layer, int))
    return len(found) or manifest.num_layers
