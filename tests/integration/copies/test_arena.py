"""The memory of one node cache as a rank maps it: who holds it, and what of it is pinned."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.integration.copies.copy_engines import HEADS
from tests.integration.copies.kv_layouts import make_arena
from ucm.integration.copies.arena import Piece


def test_closing_waits_for_holders_and_the_last_of_them_lets_go() -> None:
    arena = make_arena(1, HEADS)
    arena.hold()
    assert not arena.close(timeout_s=0.01)
    with pytest.raises(RuntimeError, match="closed"):
        arena.hold()
    arena.release()

    assert arena.close(timeout_s=0)


def test_closing_returns_when_the_holder_releases() -> None:
    arena = make_arena(1, HEADS)
    arena.hold()
    timer = threading.Timer(0.05, arena.release)
    timer.start()

    assert arena.close(timeout_s=30)
    timer.join()


@given(
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.integers(0, 1200),
    st.integers(0, 1200),
)
def test_pieces_are_the_range_cut_where_pinning_changes(pinned: list[bool], a: int, b: int) -> None:
    """The model is a flag per byte. Neighbours that were pinned apart are not joined."""
    arena = make_arena(1, HEADS)
    arena._registered = [Piece(100 * i, 100, pinned=True) for i in range(12) if pinned[i]]
    start, end = min(a, b), max(a, b)
    pieces = arena.pieces(start, end - start)

    flags = [(p.start + i, p.pinned) for p in pieces for i in range(p.nbytes)]
    assert [(i, pinned[i // 100]) for i in range(start, end)] == flags
    for piece in pieces:
        if piece.pinned:
            assert piece.start // 100 == (piece.end - 1) // 100


def test_memory_can_be_prepared_again_and_keeps_its_bytes() -> None:
    arena = make_arena(2, HEADS)
    for _ in range(2):
        arena.prepare(0, arena.bytes.numel())

    assert bool((arena.bytes == 0xEE).all())
