"""What a page has behind the tokens of a tail: zeros.

A tail fills its engine block only in part, and its slot even less; behind its tokens both hold what
they held before, which is another prompt's. But a page follows from its key, whoever made it. So
each rank that dumps zeros what is behind the tail in its own share of the page: after its copies
have landed, because they bring whole engine blocks, and before it says that they have, because then
the page is committed. The shares of the ranks that dump make up the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ucm.errors import UcmError
from ucm.integration.copies.arena import Arena
from ucm.integration.copies.jobs import PagePart
from ucm.store.blocks.page_layout import PageGeometry, RankShare


@dataclass(frozen=True)
class TailBlanker:
    """One target's. Any thread, for slots that nobody else writes this share of."""

    geometry: PageGeometry
    share: RankShare

    def blank(self, parts: Sequence[PagePart], arena: Arena, layer: int | None) -> None:
        """All of the target's layers, or `layer`, a position in its share. Raises UcmError for what
        can't be a tail's page, and RuntimeError for one outside of the arena."""
        layers = self.share.layers
        if layer is not None:
            layers = layers[layer : layer + 1]
        for part in parts:
            if part.tail_tokens:
                self._behind(part, arena, layers).zero_()

    def _behind(self, part: PagePart, arena: Arena, layers: range) -> Tensor:
        """The bytes behind the tail, as [layer, head, byte]."""
        geometry, heads = self.geometry, self.share.heads
        tail_tokens, block_tokens = part.tail_tokens, geometry.block_tokens
        if geometry.unit_tokens > 1 or not 0 < tail_tokens < block_tokens:
            raise UcmError(
                f"a tail of {tail_tokens} tokens in pages of {block_tokens}, which lie in units of "
                f"{geometry.unit_tokens}"
            )
        return arena.bytes.as_strided(
            (len(layers), len(heads), (block_tokens - tail_tokens) * geometry.unit_bytes),
            (self.share.layer_stride_bytes(geometry), geometry.head_bytes, 1),
            part.slot_offset + geometry.offset(layers.start, heads.start, tail_tokens),
        )
