"""What of a layer's layout its tensors don't show: the order in which kernels keep a block."""

from __future__ import annotations

from enum import Enum


class LayoutKind(Enum):
    """`AS_SHAPED`: the dimensions of the tensors say where everything is (`shapes` tells which is
    which). All others are orders that a kernel keeps behind them, which the engine has to know of:
    K transposed inside a block, MLA's rope part as its even elements and then its odd ones, or
    bytes that mean something to their kernel alone."""

    AS_SHAPED = "as shaped"
    CPU_VEC = "cpu_vec"
    ROPE_HALVES = "rope halves"
    OPAQUE = "opaque"
    STATE = "state"
