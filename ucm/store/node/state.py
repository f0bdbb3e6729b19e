"""Who talks to a node cache: connections, and the sessions that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ucm.store.keys import Key
from ucm.store.node.protocol import NodeMessage
from ucm.store.slots import Slot
from ucm.store.tier import TierNamespace


@dataclass(frozen=True)
class OpenedNamespace:
    """A namespace as one client opened it."""

    tier: TierNamespace
    slot_bytes: int
    block_tokens: int
    num_rows: int


@dataclass(eq=False)
class Session:
    """One engine's life here. `filling` holds the slots that its ranks write into; `pinned` the
    pages promised to it, by the connection and the lookup that asked, and `heads` what of the same
    prompts the engine had itself. Slots are given back when the last connection has closed."""

    name: str
    connections: set[Connection] = field(default_factory=set)
    filling: dict[Key, Slot] = field(default_factory=dict)
    pinned: dict[tuple[Connection, int], list[Slot]] = field(default_factory=dict)
    heads: dict[tuple[Connection, int], Sequence[Key]] = field(default_factory=dict)


@dataclass(eq=False)
class Connection:
    """One client. `send` queues a message to it; the server owns the socket behind it."""

    send: Callable[[NodeMessage], None]
    session: Session
    role: str
    memory_ready: bool = False
    namespaces: dict[int, OpenedNamespace] = field(default_factory=dict)
