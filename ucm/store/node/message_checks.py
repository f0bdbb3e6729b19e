"""What may come in by the socket: messages that make sense, alone and next to what is there.

Every message is checked here before it changes anything. One that makes no sense raises
ProtocolError, which ends the client that sent it and nobody else. What only the state behind can
tell (an id that is in use) is checked there, before the state changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ucm.errors import ProtocolError
from ucm.store.blocks.keys import Key
from ucm.store.node import protocol as p
from ucm.store.node.sessions import Asked, OpenedNamespace, weight
from ucm.store.node.slots import SlotTable

MAX_NAMESPACES = 4096
_KEY_BYTES = 32
_ROLES = ("scheduler", "worker", "store", "tool")


def check_hello(hello: p.Hello) -> None:
    if hello.role not in _ROLES:
        raise ProtocolError(f"a client with the role {hello.role[:20]!r}")


def check_namespace(message: p.OpenNamespace, opened: Iterable[int]) -> None:
    numbers = set(opened)
    if message.ns not in numbers and len(numbers) >= MAX_NAMESPACES:
        raise ProtocolError(f"more than {MAX_NAMESPACES} namespaces on one connection")


def check_message(
    message: p.Lookup | p.Find | p.Reserve | p.Commit,
    namespace: OpenedNamespace,
    slots: SlotTable,
    *,
    max_keys: int,
) -> None:
    """Whether a message about the keys of a namespace can be acted on."""
    check_keys(message.keys, namespace, slots, max_keys=max_keys)
    if isinstance(message, p.Lookup):
        check_lookup(message)
    if isinstance(message, (p.Lookup, p.Reserve)):
        check_tail(message.tail_tokens, namespace)
    if isinstance(message, (p.Reserve, p.Commit)):
        check_parents(message.keys, message.parents)


def check_open(message: p.Lookup | p.Find, asked: Asked, *, max_open_keys: int) -> None:
    """A client that asks and asks, and gives nothing back, would fill the memory of all."""
    if asked.num_keys + weight(message) > max_open_keys:
        raise ProtocolError(
            f"open lookups and finds with more than {max_open_keys} keys (node_cache_max_open_keys)"
        )


def check_keys(
    keys: Sequence[bytes], namespace: OpenedNamespace, slots: SlotTable, *, max_keys: int
) -> None:
    if len(keys) > max_keys:
        raise ProtocolError(
            f"a message with {len(keys)} keys, over the limit of {max_keys} (node_cache_max_keys)"
        )
    for key in keys:
        slot = slots.find(Key(key))
        if slot is not None and slot.span.slot_bytes != namespace.slot_bytes:
            raise ProtocolError(f"key {key.hex()} is that of a page of another size")


def check_tail(tail_tokens: int, namespace: OpenedNamespace) -> None:
    if tail_tokens >= namespace.block_tokens:
        raise ProtocolError(
            f"a tail of {tail_tokens} tokens, and a block has {namespace.block_tokens}"
        )


def check_parents(keys: Sequence[bytes], parents: Sequence[bytes]) -> None:
    """One for each key, and none that comes after its child: what waits for itself never ends."""
    if len(keys) != len(parents):
        raise ProtocolError(f"{len(keys)} keys with {len(parents)} parents")
    if any(parent and len(parent) != _KEY_BYTES for parent in parents):
        raise ProtocolError(f"a parent that is no key of {_KEY_BYTES} bytes")
    place = {key: i for i, key in reversed(list(enumerate(keys)))}
    for i, parent in enumerate(parents):
        if parent and place.get(parent, -1) >= i:
            raise ProtocolError(f"key {keys[i].hex()} with a parent that is, or follows, itself")


def check_lookup(message: p.Lookup) -> None:
    if max(message.read_from, message.promised) > len(message.keys):
        raise ProtocolError(f"lookup {message.id}: read_from or promised is beyond its keys")
