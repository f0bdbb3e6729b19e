"""Who talks to a node cache: connections, and the sessions that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from msgspec import Struct

from ucm.store.blocks.keys import Key
from ucm.store.node.protocol import Find, Lookup, NodeMessage
from ucm.store.node.slots import Slot
from ucm.store.tiers.tier import TierNamespace


@dataclass(frozen=True)
class OpenedNamespace:
    """A namespace as one client opened it."""

    tier: TierNamespace
    slot_bytes: int
    block_tokens: int


@dataclass(eq=False, slots=True)
class Filling:
    """A slot that is being filled with the page of a key: from storage, or by an engine."""

    slot: Slot
    key: Key
    namespace: OpenedNamespace
    from_storage: bool


@dataclass(eq=False)
class Session:
    """One engine's life here. `filling` holds the slots that its ranks write into; `pinned` the
    pages promised to it, by the connection and the lookup that asked, and `heads` what of the same
    prompts the engine had itself. `aside` is memory that was being filled by ranks whose scheduler
    side has gone: nobody will commit it, and they may still write. Slots are given back when the
    last connection has closed."""

    name: str
    connections: set[Connection] = field(default_factory=set)
    filling: dict[Key, Filling] = field(default_factory=dict)
    aside: list[Slot] = field(default_factory=list)
    pinned: dict[tuple[Connection, int], list[Slot]] = field(default_factory=dict)
    heads: dict[tuple[Connection, int], Sequence[Key]] = field(default_factory=dict)


class Asked:
    """What one client has asked for and not given back: its finds that are not answered, and its
    lookups that are not answered, or hold pages. Each counts with its keys, and one more."""

    def __init__(self) -> None:
        self._open: dict[tuple[type[Struct], int], int] = {}
        self.num_keys = 0

    def begin(self, message: Lookup | Find) -> None:
        self._open[type(message), message.id] = num_keys = weight(message)
        self.num_keys += num_keys

    def end(self, kind: type[Struct], number: int) -> None:
        self.num_keys -= self._open.pop((kind, number), 0)

    def open(self) -> set[tuple[type[Struct], int]]:
        return set(self._open)


def weight(message: Lookup | Find) -> int:
    return len(message.keys) + 1


@dataclass(eq=False)
class Connection:
    """One client. `send` queues a message to it; the server owns the socket behind it."""

    send: Callable[[NodeMessage], None]
    session: Session
    role: str
    memory_ready: bool = False
    asked: Asked = field(default_factory=Asked)
    namespaces: dict[int, OpenedNamespace] = field(default_factory=dict)
