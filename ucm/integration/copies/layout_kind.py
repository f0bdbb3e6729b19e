"""How an engine's backend lays a layer's KV into memory: `layout` reads each kind."""

from __future__ import annotations

from enum import Enum


class LayoutKind(Enum):
    PACKED = "packed"
    CPU_VEC = "cpu_vec"
    SPLIT = "split"
    MLA = "mla"
    OPAQUE = "opaque"
    STATE = "state"
