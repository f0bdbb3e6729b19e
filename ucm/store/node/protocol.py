"""What is said over the node cache's socket.

A frame is a little-endian u32 length and a msgpack body. A client opens with `Hello`; the node
cache answers with `Welcome`, to which the memory's file descriptor is attached (SCM_RIGHTS).
After that each side sends when it likes; answers carry the id of their question.

A *session* is one engine's life on one node cache: its scheduler side and all its ranks connect
under one session name. Pins and unfinished slots belong to the session and are given back when its
last connection has closed, because a rank may still be copying when the scheduler side is gone.

Keys travel as 32 bytes; `ns` is a number that the client chose in `OpenNamespace`, valid for its
connection. Offsets are bytes into the shared memory.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from ucm.config.settings import NODE_PROTOCOL
from ucm.errors import ProtocolError
from ucm.outcome import Outcome
from ucm.store.blocks.keys import Key, TailKey
from ucm.store.node.frames import LENGTH, MAX_FRAME_BYTES
from ucm.store.node.frames import FrameBuffer as FrameBuffer

VERSION: Final = NODE_PROTOCOL
MAX_UNSENT_BYTES: Final = 64 << 20  # a peer that leaves so much unread is as good as gone
_T = TypeVar("_T")

_Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
_Parent = Annotated[bytes, Meta(max_length=32)]
_Count = Annotated[int, Meta(ge=0)]
_Size = Annotated[int, Meta(gt=0, le=1 << 40)]
_Cost = Annotated[float, Meta(ge=0)]

HAVE: Final = -1
NO_ROOM: Final = -2

# Readable on this node, waiting to be written, and written: by which tier, where each was asked.
IN_MEMORY: Final = 1
QUEUED: Final = 2
IN_STORAGE: Final = 4
IN_NEAR, IN_FAR = 8, 16


# -- from clients, and to them from `Welcome` on -----------------------------------------------


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    version: int
    session: str
    # "scheduler" and "worker" of an engine, "store" (the store API), "tool" (only asks).
    role: str
    pid: int


class MemoryReady(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """A worker has mapped the memory and can copy from and to every slot."""


class OpenNamespace(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    ns: int
    fingerprint: _Bytes32
    page_bytes: _Size
    block_tokens: _Size
    manifest: bytes


class GetManifest(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """What is another namespace? Answered from storage."""

    id: int
    fingerprint: _Bytes32


class ReadCosts(msgspec.Struct, frozen=True, array_like=True):
    """How many blocks the client computes while a page is read, and while it waits for the `first`
    of several more."""

    first: _Cost
    each: _Cost


class Lookup(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Which leading blocks can be had?

    Of `keys[:read_from]` the client only wants to know which are stored (it has their contents);
    `keys[read_from:]` are brought into slots and pinned, up to the first that can't be had.
    With `load` false nothing is read or pinned. Settled after `timeout_ms` with what is there.

    The first `promised` keys are there or on their way: they are waited for while time is left.
    With `renewed` the time starts anew with each page that comes. The last key is that of a tail of
    `tail_tokens`, unless those are 0.

    With `costs` storage is read only as far as that takes less time than computing the blocks.
    """

    id: int
    ns: int
    keys: list[_Bytes32]
    read_from: _Count
    load: bool
    timeout_ms: _Count
    promised: _Count = 0
    renewed: bool = False
    tail_tokens: _Count = 0
    costs: ReadCosts | None = None


class Find(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Where is each of `keys`? Unlike in a lookup each stands for itself, and nothing is read or
    pinned. Storage is asked about keys that memory lacks, with `storage` about all of them.
    Answered after `timeout_ms` with what is known."""

    id: int
    ns: int
    keys: list[_Bytes32]
    storage: bool
    timeout_ms: _Count


class Release(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Gives back the pins of answered lookups, or withdraws unanswered ones."""

    lookups: list[int]


class Reserve(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Slots to dump into. Answered block by block: an offset, HAVE, or NO_ROOM. `parents[i]`
    precedes `keys[i]` in the prompt (empty for the first block of a prompt). A client that
    `will_ask_again` where there is no room has not dropped its dump yet: it is not counted.
    `tail_tokens` as in `Lookup`."""

    id: int
    ns: int
    keys: list[_Bytes32]
    parents: list[_Parent]
    will_ask_again: bool = False
    tail_tokens: _Count = 0


class Commit(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """The slots of `keys` hold their pages, that of a tail with zeros behind its tokens. In prompt
    order, with parents as in `Reserve`."""

    ns: int
    keys: list[_Bytes32]
    parents: list[_Parent]


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """The slots reserved for `keys` won't be filled; nobody writes into them any more."""

    ns: int
    keys: list[_Bytes32]


class GetStatus(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """With `check` the law of the slots is checked as well, which takes long in a large cache."""

    id: int
    check: bool = False


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Finish queued writes (bounded), then leave."""


class Welcome(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """`settings` are those that the node cache was started with, by their names in StoreSettings:
    whose pages it serves, and all the rest. Every version can read every other's first fields."""

    version: int
    arena: str
    capacity_bytes: int
    pid: int
    settings: dict[str, Any] = msgspec.field(default_factory=dict)


class NamespaceOpened(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """`error` is empty when all is well. Not `refused` in spite of an error: the manifest could not
    be written, say on a read-only mount; pages can still be had."""

    ns: int
    error: str
    refused: bool


class ManifestFound(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """`manifest` is empty where storage has none of it, or could not be read (`error`)."""

    id: int
    manifest: bytes
    error: str


class LookupReply(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """`offsets[i]` holds the page of `keys[read_from + i]`, pinned until `Release`. Of these it
    has `brought` so many; `from_files` came from storage, those behind the prefix too, in `read_us`
    microseconds. Of `keys[:read_from]` the first `head_stored` are in the store. Without `load`
    nothing is pinned, `num_stored` counts what follows. `reason` says what ended the prefix (FINE:
    nothing did), which has `refused` blocks more than were worth reading."""

    id: int
    offsets: list[int]
    num_stored: int
    from_files: int
    head_stored: int
    reason: Outcome
    refused: int = 0
    read_us: int = 0
    brought: int = 0


class Found(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """`places[i]` says where `keys[i]` is, as a sum of IN_MEMORY and so on; 0 is nowhere. `reason`
    says why storage could not tell about some of them (FINE: it could)."""

    id: int
    places: bytes
    reason: Outcome


class ReserveReply(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Storage is likely to refuse what is filled from `doubted_from` on: until a `SavingNews` says
    that it is saved nobody is to promise it."""

    id: int
    offsets: list[int]
    doubted_from: _Count | None = None


class SavingNews(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Of pages that were accepted or counted on: `refused` are not in storage and not on their way
    there (`reason`), so nobody is to promise them. `saved` had been refused or doubted before."""

    refused: list[_Bytes32]
    saved: list[_Bytes32]
    reason: Outcome


class Notice(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """For the engine's log: what people should hear of storage. Or why there is no Welcome."""

    text: str


class MemoryInUse(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """To workers: this part of the memory holds slots or soon will; pin or map it ahead."""

    offset: int
    nbytes: int


class RanksReady(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """To the scheduler side: how many ranks of the session have mapped the memory."""

    count: int


class Status(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    id: int
    pid: int
    arena: str
    slots: dict[str, int]
    sessions: dict[str, dict[str, int]]
    queues: dict[str, int]
    counters: dict[str, int]
    invariant: str  # empty: holds, or was not checked
    tier: str = ""  # its name; empty: memory is all there is
    far: str = ""  # of the tier behind it

    def unwritten(self, reason: Outcome, of: str = "") -> int:
        """Pages that did not get to storage. Failed writes count by what storage said, pages that
        were never tried by why not. `of`: before the names of a tier's counters."""
        names = (f"{of}write_failed_{reason}", f"{of}dump_dropped_{reason}", f"{of}dump_{reason}")
        return sum(self.counters.get(name, 0) for name in names)


ClientMessage = (
    Hello
    | MemoryReady
    | OpenNamespace
    | GetManifest
    | Lookup
    | Find
    | Release
    | Reserve
    | Commit
    | Abort
    | GetStatus
    | Shutdown
)
NodeMessage = (
    Welcome
    | NamespaceOpened
    | ManifestFound
    | LookupReply
    | Found
    | ReserveReply
    | SavingNews
    | Notice
    | MemoryInUse
    | RanksReady
    | Status
)


def keys_of(message: Lookup | Reserve) -> list[Key]:
    keys = [Key(key) for key in message.keys]
    if message.tail_tokens and keys:
        keys[-1] = Key(TailKey(keys[-1], message.tail_tokens))
    return keys


def _as_bytes(value: object) -> bytes:
    """A tail's key; how many tokens it has is said beside it."""
    if isinstance(value, TailKey):
        return bytes(value)
    raise NotImplementedError(f"a message with a {type(value).__name__}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_as_bytes)
_client_decoder: msgspec.msgpack.Decoder[ClientMessage] = msgspec.msgpack.Decoder(ClientMessage)
_node_decoder: msgspec.msgpack.Decoder[NodeMessage] = msgspec.msgpack.Decoder(NodeMessage)


def encode(message: ClientMessage | NodeMessage) -> bytes:
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a {type(message).__name__} of {len(body)} bytes is over the limit")
    return LENGTH.pack(len(body)) + body


def decode_client(body: bytes) -> ClientMessage:
    return _decode(_client_decoder, body)


def decode_node(body: bytes) -> NodeMessage:
    return _decode(_node_decoder, body)


def _decode(decoder: msgspec.msgpack.Decoder[_T], body: bytes) -> _T:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"unreadable message on the node cache socket: {error}") from error
