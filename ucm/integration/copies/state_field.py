"""Where the state of a linear-attention layer lies in an engine's block, and in a page. Knows no
torch.

A state is a few fields, each cut over ranks in its own way: by heads, or by groups that heads
share. In a page they follow each other, each as if it were a page of its own:

    [field][layer][head][row][column]

A rank has some heads of each field, in one block of bytes per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from ucm.store.blocks.page_layout import PageGeometry


@dataclass(frozen=True)
class StateField:
    """`geometry` is that of all ranks: its units are rows and its content is columns. It begins
    `page_offset_bytes` after the page, and a rank's heads `block_offset_bytes` after the block of a
    layer, whose elements lie `strides` (of head, row, column) apart. `dtype` names that of its
    numbers."""

    name: str
    geometry: PageGeometry
    page_offset_bytes: int
    block_offset_bytes: int
    strides: tuple[int, int, int]
    dtype: str
