"""Of which strand of its model a page is.

A page of a strand has a key that is made of its block's, and tells nothing. But pages of unlike
strands mostly differ in size, which their manifest tells. A manifest was written by anybody who may
write there: what it lacks is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from ucm.store.blocks.blockfile import HEADER_BYTES
from ucm.store.blocks.namespace import Manifest
from ucm.store.blocks.page_layout import PageGeometry, padded_bytes
from ucm.store.blocks.strands import STATE
from ucm.store.inspect.model_label import strand_labels

_SIZES: Final = ("num_layers", "num_kv_heads", "k_size", "v_size", "item_bytes")
# Of pages that are an engine's blocks as they are: how many tokens one of these has.
_RAW_BLOCK: Final = re.compile(r"^opaque:.*:block(\d+)")


class StrandPages:
    """How large the pages of each strand are. Without a manifest, or without strands, nothing is
    known of any page."""

    def __init__(self, manifest: Manifest | None) -> None:
        self._strands: list[tuple[str, int]] = []
        if manifest is not None:
            sizes = [_page_bytes(strand, manifest) for strand in manifest.strands or ()]
            self._strands = list(zip(strand_labels(manifest), sizes, strict=True))

    @property
    def page_bytes(self) -> list[int]:
        """Of each strand, 0 if unknown. Of the first one every block has a page, or most have."""
        return [nbytes for _, nbytes in self._strands]

    def of_page(self, page_bytes: int) -> str:
        """The label of the strand whose pages are so large, or of those; empty if unknown."""
        return _or(label for label, nbytes in self._strands if nbytes and nbytes == page_bytes)

    def of_file(self, file_bytes: int) -> str:
        """The same by the length of the page's file."""
        return _or(
            label
            for label, nbytes in self._strands
            if nbytes and HEADER_BYTES + padded_bytes(nbytes) == file_bytes
        )


def _or(labels: Iterable[str]) -> str:
    return " or ".join(labels)


def _page_bytes(strand: dict[str, object], manifest: Manifest) -> int:
    """0 if it can't be told."""
    sizes = {name: strand.get(name) for name in _SIZES}
    unit_tokens = 1
    if strand.get("reach") == str(STATE):
        unit_tokens = manifest.block_tokens
    elif raw := _RAW_BLOCK.match(str(strand.get("layout"))):
        unit_tokens = int(raw[1])
    numbers = {name: size for name, size in sizes.items() if isinstance(size, int)}
    if len(numbers) < len(_SIZES):
        return 0
    try:
        return PageGeometry(
            block_tokens=manifest.block_tokens, unit_tokens=unit_tokens, **numbers
        ).page_bytes
    except ValueError:
        return 0
