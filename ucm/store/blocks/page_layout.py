"""Where the bytes of a block lie in its page. Pure arithmetic on named dimensions.

A page is the canonical form of one block, the same for every engine and every rank:

    [layer][kv_head][unit][content]

`unit` is one token and `content` is K then V of that token and head. MLA has one head and no V: its
content is the latent and then the rope part, whose pairs are side by side, whatever order a kernel
keeps them in. An opaque layout has one engine block as its unit, one head per tensor parallel rank,
and raw bytes as its content. All sizes are in bytes, all ranges are half-open.

A rank holds some layers (its pipeline stage, or one of an engine's cache groups, which may be every
nth layer) and some heads (its tensor parallel share) of every page: one contiguous run of bytes per
layer.
"""

from __future__ import annotations

from dataclasses import dataclass

# What a slot's start and size are rounded up to: the page size of memory, and what O_DIRECT takes.
PAGE_ALIGNMENT_BYTES = 4096


def padded_bytes(page_bytes: int) -> int:
    """Length of the buffer that holds a page, in slots and on disk."""
    return -(-page_bytes // PAGE_ALIGNMENT_BYTES) * PAGE_ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class Run:
    """The bytes [offset, offset + nbytes) of a page."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True, kw_only=True, slots=True)
class PageGeometry:
    """The shape of every page of a namespace. Sizes of content are in elements of `item_bytes`."""

    num_layers: int
    num_kv_heads: int
    block_tokens: int
    k_size: int
    v_size: int
    item_bytes: int
    unit_tokens: int = 1

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "block_tokens", "k_size", "item_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.v_size < 0:
            raise ValueError(f"v_size is {self.v_size}, must not be negative")
        if self.unit_tokens < 1 or self.block_tokens % self.unit_tokens:
            raise ValueError(
                f"unit_tokens is {self.unit_tokens}, must divide block_tokens ({self.block_tokens})"
            )

    @property
    def num_units(self) -> int:
        return self.block_tokens // self.unit_tokens

    @property
    def content_size(self) -> int:
        """Elements of one unit of one head: K, then V."""
        return self.k_size + self.v_size

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[layer, kv_head, unit, content], in elements."""
        return (self.num_layers, self.num_kv_heads, self.num_units, self.content_size)

    @property
    def unit_bytes(self) -> int:
        """One unit of one head: the distance from one unit to the next."""
        return self.content_size * self.item_bytes

    @property
    def head_bytes(self) -> int:
        return self.num_units * self.unit_bytes

    @property
    def layer_bytes(self) -> int:
        return self.num_kv_heads * self.head_bytes

    @property
    def page_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    @property
    def slot_bytes(self) -> int:
        return padded_bytes(self.page_bytes)

    def offset(self, layer: int, head: int, unit: int = 0) -> int:
        """Where one unit of one head of one layer starts."""
        assert 0 <= layer < self.num_layers, f"layer {layer} of {self.num_layers}"
        assert 0 <= head < self.num_kv_heads, f"head {head} of {self.num_kv_heads}"
        assert 0 <= unit < self.num_units, f"unit {unit} of {self.num_units}"
        return layer * self.layer_bytes + head * self.head_bytes + unit * self.unit_bytes

    def run(self, layer: int, heads: range) -> Run:
        """Where neighbouring heads of one layer lie."""
        assert len(heads) > 0, "no heads"
        assert heads.step == 1, f"heads {heads} are not neighbours"
        assert heads.stop <= self.num_kv_heads, f"heads {heads} of {self.num_kv_heads}"
        return Run(self.offset(layer, heads.start), len(heads) * self.head_bytes)


@dataclass(frozen=True, slots=True)
class RankShare:
    """The part of every page that one rank holds: `layers` x `heads`, positions in the page. The
    layers may have a step.

    `dumps` is False on a rank whose part another rank holds too and writes. All ranks load.
    """

    layers: range
    heads: range
    dumps: bool

    def layer_stride_bytes(self, geometry: PageGeometry) -> int:
        """From one of these layers to the next, in a page."""
        return self.layers.step * geometry.layer_bytes


def rank_share(geometry: PageGeometry, *, tp_rank: int, tp_size: int, layers: range) -> RankShare:
    """What rank `tp_rank` of `tp_size` holds of these layers, of which it computes a part.

    As engines do it: with no more ranks than heads each rank has its own neighbouring heads. With
    more, each head is held by neighbouring ranks, and the first of them dumps. MLA has one head.
    """
    num_heads = geometry.num_kv_heads
    if not 0 <= tp_rank < tp_size:
        raise ValueError(f"tensor parallel rank {tp_rank} of {tp_size} does not exist")
    if layers.step < 1 or not layers or not 0 <= layers[0] <= layers[-1] < geometry.num_layers:
        raise ValueError(f"layers {layers} are not some of {geometry.num_layers}, first to last")
    if num_heads % tp_size == 0:
        width = num_heads // tp_size
        return RankShare(layers, range(tp_rank * width, (tp_rank + 1) * width), dumps=True)
    if tp_size % num_heads == 0:
        replicas = tp_size // num_heads
        head = tp_rank // replicas
        return RankShare(layers, range(head, head + 1), dumps=tp_rank % replicas == 0)
    raise ValueError(
        f"{num_heads} KV heads over {tp_size} tensor parallel ranks: one must divide the other"
    )
